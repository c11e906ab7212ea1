"""Scores from verdicts: pure functions of arrays [problems, samples], one value per problem."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from oprd.errors import ConfigError


def avg_at_k(correct: Bool[ndarray, "problems k"]) -> Float[ndarray, " problems"]:
    """Share of a problem's k samples that are correct."""
    return correct.mean(axis=1)


def pass_at_k(correct: Bool[ndarray, "problems n"], k: int) -> Float[ndarray, " problems"]:
    """Unbiased probability that at least one of k samples is correct, from n >= k samples.

    1 - C(n - c, k) / C(n, k) with c correct. Chen et al. 2021, arXiv 2107.03374, Eq. 1. Raises ConfigError for k > n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ConfigError(f"pass@k needs 1 <= k <= samples, got k={k} and {n} samples; draw more samples")
    c = correct.sum(axis=1)
    # the product form of the ratio of binomials, which does not overflow
    factors = [np.clip((n - c - i) / (n - i), 0.0, None) for i in range(k)]
    return 1.0 - np.prod(factors, axis=0)


def best_at_k(correct: Bool[ndarray, "problems k"]) -> Float[ndarray, " problems"]:
    """1 where any of the k samples is correct: pass@k when exactly k were drawn, and noisier than it from more."""
    return correct.any(axis=1).astype(float)


def maj_at_k(
    extracted: Sequence[Sequence[str | None]], correct: Bool[ndarray, "problems k"]
) -> Float[ndarray, " problems"]:
    """Whether the most frequent answer is correct. A tie counts for the share of the tied answers that are.

    Answers are the same when their text is, spaces aside. A sample without an answer does not vote.
    """
    scores = []
    for answers, right in zip(extracted, correct, strict=True):
        texts = [None if answer is None else "".join(answer.split()) for answer in answers]
        votes = Counter(text for text in texts if text is not None)
        most = max(votes.values(), default=0)
        tied = [text for text, count in votes.items() if count == most]
        scores.append(sum(bool(right[texts.index(text)]) for text in tied) / len(tied) if tied else 0.0)
    return np.array(scores)


def distinct_n(completions: Sequence[Sequence[int]], n: int = 4) -> float:
    """Distinct n-grams over all n-grams of token ids, pooled over the completions; 0 when there are none."""
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def bootstrap_interval(
    values: Float[ndarray, " problems"], *, seed: int, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling problems: samples of one problem are not independent."""
    if not len(values):
        raise ConfigError("an interval needs at least one problem")
    rng = np.random.default_rng(seed)
    rows = max(1, 2**22 // len(values))
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
