"""EffOPD, arXiv 2605.11739: after some updates, try to go further in the direction the weights have moved.

    delta = W_t - W_prev;  candidates W_t + f * delta, f = 2, 4, 6, 8, 10 in order, while the score does not fall

W_prev: the weights accepted at the previous trigger, at first the start [code]. Only attention and MLP weights move: norms,
embeddings and the LM head stay [code]; of a LoRA student the adapter moves [ours]. Optimizer and scheduler stay as they are.
No objective knows about it, and it knows no objective: `score` is whatever the loop measures with the weights in place.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oprd.config.recipe import PAIRED_LEVEL, SIGN_FLIPS, EffOPDConfig
from oprd.errors import TrainingStopped
from oprd.models import LanguageModel
from oprd.seeds import derive_seed
from oprd.types import Prompt

SETTLED_COSINE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a set of weights reached on the validation prompts, the same on every process."""

    values: tuple[float, ...]
    """One per prompt, higher is better."""
    tokens: int
    """Generated for it, over all processes; once where each writes the same."""

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
    """Chance of a mean difference to the best before as large as this one, were both equal; one-sided."""
    accepted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search, as it is logged."""

    score: float
    """Of the weights after the plain update."""
    candidates: tuple[Candidate, ...]
    """In the order of trial; all but the last were accepted, and perhaps the last."""
    tokens: int
    """Generated for all scores, over all processes."""

    @property
    def accepted(self) -> float:
        """Factor of the weights that stay; 0 is the plain update."""
        return next((c.factor for c in reversed(self.candidates) if c.accepted), 0.0)


def search(
    config: EffOPDConfig, score: Callable[[float], Scores], agreed: Callable[[bool], None] = lambda accepted: None
) -> Search:
    """Try the factors in order until one is not accepted. `score` is called with 0 first: the plain update.

    `agreed` is told every decision before anything is done about it.
    """
    start = best = score(0.0)
    tried: list[Candidate] = []
    tokens = start.tokens
    for factor in config.factors:
        scores = score(factor)
        tokens += scores.tokens
        p_value = paired_p_value(best.values, scores.values)
        accepted = accepts(config, best.mean, scores.mean, p_value)
        agreed(accepted)
        tried.append(Candidate(factor=factor, score=scores.mean, p_value=p_value, accepted=accepted))
        if not accepted:
            break
        best = scores
    return Search(score=start.mean, candidates=tuple(tried), tokens=tokens)


def accepts(config: EffOPDConfig, best: float, score: float, p_value: float) -> bool:
    """Whether a candidate replaces the best so far. One that is not a finite number never does."""
    if not math.isfinite(score):
        return False
    # means of thirds or fifths that are equal differ by rounding, either way
    tie = math.isclose(score, best, rel_tol=1e-12, abs_tol=1e-12)
    better = score > best and not tie
    if config.accept == "paired":
        return better and p_value <= (config.level or PAIRED_LEVEL)
    return better or (config.accept_ties and tie)


def paired_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """One-sided sign-flip test on the prompts' differences: P(mean difference >= the one seen) when signs are chance.

    9,999 flips drawn with a fixed seed and the one seen: the same on every process. 1 where the mean is not finite.
    """
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    seen = difference.sum()
    if not bool(torch.isfinite(seen)):
        return 1.0
    signs = torch.randint(0, 2, (SIGN_FLIPS, len(difference)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    # differences of accuracies are multiples of 1/samples: a tie must count as one in spite of rounding
    at_least = (signs.double() @ difference >= seen - 1e-12 * difference.abs().sum()).sum()
    return (1 + int(at_least)) / (1 + SIGN_FLIPS)


def is_trigger(config: EffOPDConfig, step: int) -> bool:
    """Whether a search may follow this step, counted from 1; under `settled` the direction decides as well."""
    if config.triggers == "powers_of_two":
        return step & (step - 1) == 0
    assert config.every is not None
    return step % config.every == 0


def movable_weights(lm: LanguageModel) -> dict[str, nn.Parameter]:
    """Trained attention and MLP weights by name: what is in the blocks and not in a norm."""
    return {
        f"{block}.{path}.{name}": parameter
        for block, module in enumerate(lm.blocks, start=1)
        for path, child in module.named_modules()
        if "Norm" not in type(child).__name__  # `RMSNorm`, `LayerNorm1P`, `RMSNormGated`
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
    """Holds W_prev and moves the weights. Every process holds what it trains: under FSDP its shards, else all.

    Snapshots are in CPU memory and have the parameters' dtype; candidates are computed in float32, one tensor at a time.
    During a search there is a second snapshot, from which the plain update is restored bit for bit.
    `add_shards` adds numbers up over processes when each has another part of the weights; `everywhere` gives a process's
    number of every process. `moved` is called when weights were written: whoever holds gathered copies of shards lets go.
    """

    def __init__(
        self,
        config: EffOPDConfig,
        lm: LanguageModel,
        *,
        add_shards: Callable[[Sequence[float]], list[float]],
        everywhere: Callable[[float], list[float]],
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._weights = movable_weights(lm)
        self._add_shards = add_shards
        self._everywhere = everywhere
        self._moved = moved
        self._previous = self._snapshot()
        # the last interval's movement is compared with this one's under `settled`
        settles = config.triggers == "settled"
        self._least_cosine = SETTLED_COSINE if config.settled_cosine is None else config.settled_cosine
        self._movement = {name: torch.zeros_like(value) for name, value in self._previous.items()} if settles else {}

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, shards where the weights are sharded; loading writes into them."""
        named = {"previous": self._previous, "movement": self._movement}
        return {f"{kind}.{name}": value for kind, values in named.items() for name, value in values.items()}

    def after_update(self, step: int, score: Callable[[], Scores]) -> dict[str, Any] | None:
        """Search if this step is a trigger, and leave the accepted weights in place. The search's line in the log.

        `score` measures the weights that are in place; it must give the same on every process.
        Raises TrainingStopped when processes decided differently.
        """
        if not is_trigger(self.config, step):
            return None
        start = time.perf_counter()
        norm, cosine = self._direction()
        settled = self.config.triggers != "settled" or cosine >= self._least_cosine
        if norm == 0.0 or not settled:  # a skipped update, or a warm-up that starts at zero, has no direction
            self._remember()
            return None
        plain = self._snapshot()

        def measure(factor: float) -> Scores:
            self._move(plain, factor)
            return score()

        def agreed(accepted: bool) -> None:
            # a process that went on alone would wait for the others forever
            if len(set(self._everywhere(float(accepted)))) > 1:
                raise TrainingStopped(
                    f"step {step}: processes accepted different candidates; their scores must be equal"
                )

        found = search(self.config, measure, agreed)
        self._move(plain, found.accepted)
        self._remember()
        return {
            "step": step,
            "score": found.score,
            "candidates": [
                {"factor": c.factor, "score": c.score, "p_value": c.p_value, "accepted": c.accepted}
                for c in found.candidates
            ],
            "accepted": found.accepted,
            "delta_norm": norm,
            **({"cosine": cosine} if self._movement else {}),
            "tokens": found.tokens,
            "snapshot_mib": round(_mib(plain) + _mib(self._previous) + _mib(self._movement), 3),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _snapshot(self) -> dict[str, Tensor]:
        """Copies in CPU memory; of a sharded weight a DTensor that holds this process's shard."""
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
        self._moved()

    @torch.no_grad()
    def _direction(self) -> tuple[float, float]:
        """(norm of delta, its cosine with the last interval's movement; 0 at first). Remembers the movement."""
        sums = [0.0, 0.0, 0.0]
        for name, delta in self._deltas():
            sums[0] += float(delta.double().square().sum())
            if name in self._movement:
                before = _local(self._movement[name])
                sums[1] += float(before.double().square().sum())
                sums[2] += float((delta.double() * before.double()).sum())
                before.copy_(delta)
        here, before, product = self._add_shards(sums)
        return here**0.5, product / (here * before) ** 0.5 if here * before > 0 else 0.0

    def _deltas(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights.items():
            yield name, _local(weight).detach().cpu() - _local(self._previous[name])


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _mib(snapshot: Mapping[str, Tensor]) -> float:
    return sum(_local(value).nbytes for value in snapshot.values()) / 2**20
