"""EffOPD, arXiv:2605.11739: after some updates, try to go further in the direction the weights have moved.

    delta = W_t - W_prev;  candidates W_t + f * delta, f = 2, 4, 6, 8, 10 in order, while the score does not fall

W_prev: the weights accepted at the previous search, at first the start. Only attention and MLP weights move: norms,
embeddings and the LM head stay; of a LoRA student the adapter moves. Optimizer and scheduler stay as they are. No objective
knows about it, and it knows no objective: `score` is whatever the loop measures with the weights in place.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, final

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oprd.distributed import Ranks
from oprd.errors import TrainingStopped
from oprd.models.families import is_norm
from oprd.models.language_model import LanguageModel
from oprd.section import Listed, PositiveInt, Rate, Section
from oprd.seeds import derive_seed
from oprd.types import Prompt

PAIRED_LEVEL = 0.05
"""Largest one-sided p at which `paired` accepts."""
SIGN_FLIPS = 9999
"""Random sign changes of the paired test; its smallest p is one in 10,000."""


class EffOPDConfig(Section):
    """EffOPD: search along the direction of the last updates. Defaults are the paper's."""

    every: PositiveInt | None = None
    """Search after every so many steps. None: after steps 1, 2, 4, 8, ..."""
    factors: Listed[Rate] = (2.0, 4.0, 6.0, 8.0, 10.0)
    """Candidates W + factor * delta, rising."""
    score: Literal["accuracy", "objective"] = "accuracy"
    """`accuracy` of the validation completions by the dataset's answers, or minus the `objective` on them."""
    validation_prompts: PositiveInt = 50
    """Training prompts, drawn once for all searches."""
    validation_samples: PositiveInt = 1
    """Completions of each."""
    accept: Literal["not_worse", "better", "paired"] = "not_worse"
    """A candidate stays if its mean score is at least the best so far (the paper), above it (its code), or above it by a
    sign-flip test on the prompts' differences (p <= 0.05)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.factors or list(self.factors) != sorted(set(self.factors)):
            raise ValueError(f"extrapolation.factors must rise and be at least one, got {list(self.factors)}")
        least = max(0.5**self.validation_prompts, 1 / (1 + SIGN_FLIPS))
        if self.accept == "paired" and least > PAIRED_LEVEL:
            raise ValueError(
                f"with validation_prompts={self.validation_prompts} the paired test gives no p below {least:.2g}, so "
                f"nothing is ever accepted at level {PAIRED_LEVEL:g}; raise it"
            )
        return self

    def is_trigger(self, step: int) -> bool:
        """Whether a search follows this step, counted from 1."""
        return step & (step - 1) == 0 if self.every is None else step % self.every == 0

    def accepts(self, best: float, score: float, p_value: float) -> bool:
        """Whether a candidate replaces the best so far. A score that is not finite never does."""
        if not math.isfinite(score):
            return False
        # equal means of thirds or fifths differ by rounding, either way
        tie = math.isclose(score, best, rel_tol=1e-12, abs_tol=1e-12)
        better = score > best and not tie
        return {"not_worse": better or tie, "better": better, "paired": better and p_value <= PAIRED_LEVEL}[self.accept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a set of weights reached on the validation prompts, the same on every rank."""

    values: tuple[float, ...]
    """One per prompt, higher is better."""
    tokens: int
    """Generated for it, over all ranks; once where each writes the same."""

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One set of weights that was tried."""

    factor: float
    """Weights W_t + factor * delta."""
    score: float
    p_value: float
    """One-sided chance of a mean difference to the best so far as large as this, were both equal."""
    accepted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search, as it is logged."""

    score: float
    """Of the weights after the plain update."""
    candidates: tuple[Candidate, ...]
    """In the order of trial; all but the last were accepted, and perhaps the last."""
    tokens: int
    """Generated for all scores, over all ranks."""

    @property
    def accepted(self) -> float:
        """Factor of the weights that stay; 0 is the plain update."""
        return next((c.factor for c in reversed(self.candidates) if c.accepted), 0.0)


def search(
    config: EffOPDConfig, score: Callable[[float], Scores], decided: Callable[[bool], None] = lambda accepted: None
) -> Search:
    """Try the factors in order until one is not accepted. `score` is called with 0 first: the plain update.

    `decided` is called with every decision before anything is done about it.
    """
    start = best = score(0.0)
    tried: list[Candidate] = []
    tokens = start.tokens
    for factor in config.factors:
        scores = score(factor)
        tokens += scores.tokens
        p_value = paired_p_value(best.values, scores.values)
        accepted = config.accepts(best.mean, scores.mean, p_value)
        decided(accepted)
        tried.append(Candidate(factor=factor, score=scores.mean, p_value=p_value, accepted=accepted))
        if not accepted:
            break
        best = scores
    return Search(score=start.mean, candidates=tuple(tried), tokens=tokens)


def paired_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """One-sided sign-flip test on the prompts' differences: P(mean difference >= the one seen) when signs are chance.

    9,999 flips drawn with a fixed seed and the one seen: the same on every rank. 1 where the mean is not finite.
    """
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    seen = difference.sum()
    if not bool(torch.isfinite(seen)):
        return 1.0
    signs = torch.randint(0, 2, (SIGN_FLIPS, len(difference)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    # differences of accuracies are multiples of 1/samples: a tie must count as one in spite of rounding
    at_least = (signs.cpu().double() @ difference >= seen - 1e-12 * difference.abs().sum()).sum()
    return (1 + int(at_least)) / (1 + SIGN_FLIPS)


def movable_weights(lm: LanguageModel) -> dict[str, nn.Parameter]:
    """Trained attention and MLP weights by name: what is in the blocks and not in a norm."""
    return {
        f"{block}.{path}.{name}": parameter
        for block, module in enumerate(lm.blocks, start=1)
        for path, child in module.named_modules()
        if not is_norm(child)
        for name, parameter in child.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def validation_prompts(config: EffOPDConfig, prompts: Sequence[Prompt], seed: int) -> tuple[Prompt, ...]:
    """The training prompts of every search of a run, drawn once: they depend on the recipe's seed alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "extrapolation", "prompts"))
    rows = torch.randperm(len(prompts), generator=generator)[: config.validation_prompts]
    return tuple(prompts[i] for i in rows.tolist())


@final
class Extrapolation:
    """Holds W_prev and moves the weights. Every rank holds what it trains: under FSDP its shards, else all.

    Snapshots are in CPU memory and have the parameters' dtype; candidates are computed in float32, one tensor at a time.
    During a search a second snapshot exists, from which the plain update is restored bit for bit.
    """

    def __init__(
        self, config: EffOPDConfig, lm: LanguageModel, ranks: Ranks, on_weights_changed: Callable[[], None]
    ) -> None:
        self.config = config
        self._weights = movable_weights(lm)
        self._ranks = ranks
        self._on_weights_changed = on_weights_changed
        self._previous = self._snapshot()

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, shards where the weights are sharded; loading writes into them."""
        return {f"previous.{name}": value for name, value in self._previous.items()}

    def after_update(self, step: int, score: Callable[[], Scores]) -> dict[str, Any] | None:
        """Search if this step is a trigger, and leave the accepted weights in place. Returns the search's log line.

        `score` measures the weights in place and gives the same on every rank. Raises TrainingStopped when ranks decide
        differently.
        """
        if not self.config.is_trigger(step):
            return None
        start = time.perf_counter()
        norm = self._delta_norm()
        if norm == 0.0:  # a skipped update has no direction
            self._remember()
            return None
        plain = self._snapshot()

        def measure(factor: float) -> Scores:
            self._move(plain, factor)
            return score()

        def decided(accepted: bool) -> None:
            # a rank that went on alone would wait for the others forever
            if len(set(self._ranks.all_gather([float(accepted)])[:, 0].tolist())) > 1:
                raise TrainingStopped(f"step {step}: ranks accepted different candidates; their scores must be equal")

        try:
            found = search(self.config, measure, decided)
        except BaseException:
            self._move(plain, 0.0)  # the loop saves what is in place
            raise
        self._move(plain, found.accepted)
        self._remember()
        return {
            "step": step,
            "score": found.score,
            "candidates": [asdict(candidate) for candidate in found.candidates],
            "accepted": found.accepted,
            "delta_norm": norm,
            "tokens": found.tokens,
            "snapshot_mib": round(_mib(plain) + _mib(self._previous), 3),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _snapshot(self) -> dict[str, Tensor]:
        """Copies in CPU memory; of a sharded weight a DTensor that holds this rank's shard."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._weights.items()}

    @torch.no_grad()
    def _remember(self) -> None:
        """The weights in place are where the next delta begins."""
        for name, value in self._weights.items():
            _local(self._previous[name]).copy_(_local(value))

    @torch.no_grad()
    def _move(self, plain: Mapping[str, Tensor], factor: float) -> None:
        """Put plain + factor * (plain - previous) in place; with factor 0 the plain weights bit for bit."""
        for name, weight in self._weights.items():
            here = _local(weight)
            at = _local(plain[name]).to(here.device)
            if factor:
                delta = at.float() - _local(self._previous[name]).to(here.device).float()
                at = at.float() + factor * delta
            here.copy_(at)
        self._on_weights_changed()

    @torch.no_grad()
    def _delta_norm(self) -> float:
        squares = 0.0
        for name, weight in self._weights.items():
            delta = _local(weight).detach().cpu() - _local(self._previous[name])
            squares += float(delta.cpu().double().square().sum())
        return (self._ranks.sum([squares])[0] if self._ranks.sharded else squares) ** 0.5


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _mib(snapshot: Mapping[str, Tensor]) -> float:
    return sum(_local(value).nbytes for value in snapshot.values()) / 2**20
