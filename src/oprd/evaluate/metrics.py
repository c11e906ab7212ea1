"""Scores from verdicts: pure functions of arrays [problems, samples], one value per problem."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from oprd.errors import ConfigError


def avg_at_k(correct: Bool[ndarray, "problems k"]) -> Float[ndarray, " problems"]:
    """Share of correct samples among a problem's k."""
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
    return 1.0 - np.prod([np.clip((n - c - i) / (n - i), 0.0, None) for i in range(k)], axis=0)


def best_at_k(correct: Bool[ndarray, "problems k"]) -> Float[ndarray, " problems"]:
    """1 where any of the k samples is correct: pass@k when exactly k were drawn."""
    return correct.any(axis=1).astype(float)


def maj_at_k(
    extracted: Sequence[Sequence[str | None]], correct: Bool[ndarray, "problems k"]
) -> Float[ndarray, " problems"]:
    """Whether the most frequent answer is correct; for a tie, the share of the tied answers that are.

    Answers are compared as text without spaces. A sample without an answer does not vote.
    """
    scores = []
    for answers, right in zip(extracted, correct, strict=True):
        texts = [None if answer is None else "".join(answer.split()) for answer in answers]
        votes = Counter(text for text in texts if text is not None)
        tied = [text for text, count in votes.items() if count == max(votes.values())]
        scores.append(sum(bool(right[texts.index(text)]) for text in tied) / max(1, len(tied)))
    return np.array(scores)


def distinct_n(completions: Sequence[Int[ndarray, " _"]], n: int = 4) -> float:
    """Distinct n-grams over all n-grams of token ids, pooled over the completions; 0 when there are none."""
    ids = np.concatenate([np.empty(0, np.uint64), *(np.asarray(row, np.uint64) for row in completions)])
    whole = np.concatenate([np.empty(0, bool), *(np.arange(len(row)) <= len(row) - n for row in completions)])
    grams = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for i in range(n):  # 64 bits for each: of 30 million n-grams, two fall together once in ten thousand times
        grams = (grams + ids[i : i + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
        grams ^= grams >> np.uint64(32)
    grams = np.sort(grams[whole[: len(grams)]])
    return (1 + np.count_nonzero(grams[1:] != grams[:-1])) / len(grams) if len(grams) else 0.0


def bootstrap_interval(
    values: Float[ndarray, " problems"], *, seed: int, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling problems: samples of one problem are not independent."""
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
