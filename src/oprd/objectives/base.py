"""What the loop asks of an objective."""

from abc import ABC, abstractmethod
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from oprd.types import Reading, Rollouts, States, Tally, TeacherTargets, TokenSelection


class Objective(ABC):
    """Compares what was read off the student with what the teacher says, token by token."""

    name: str
    """The metric's name: `train/NAME/mean`."""
    needs: Any
    """The target type it needs, or a union of those it can use."""
    readings: tuple[Reading, ...]
    """Hidden states it needs of the student."""
    across_shapes: bool = False
    """Whether the teacher may have other blocks or another width."""
    across_tokenizers: bool = False
    """Whether the teacher may read other tokens than the student."""
    uses_head: bool
    """Whether the student's LM head takes part."""
    tokens: TokenSelection
    """Supervised tokens of each completion."""
    reduction: Literal["token_mean", "sequence_mean"]
    coefficient: float
    importance_weighted: bool = False
    """Whether it needs to know with what probability the sampled tokens were written, once they are stale."""

    @property
    def teacher_readings(self) -> tuple[Reading, ...]:
        """Hidden states it needs of a teacher that gives HiddenTargets."""
        return self.readings

    @property
    def teacher_head(self) -> bool:
        """Whether the teacher's LM head takes part."""
        return self.uses_head

    @abstractmethod
    def per_token(self, student: States, teacher: TeacherTargets) -> Float[Tensor, " N"]:
        """One value per supervised token. Gradient flows to the student only; nothing is averaged here."""

    def tallies(self) -> tuple[Tally, ...]:
        """What it counted in the step's updates since it was last asked; the same names on every process."""
        return ()

    def supervised(self, rollouts: Rollouts) -> tuple[int, ...]:
        """Tokens of each completion for which `per_token` has a value."""
        return rollouts.supervised(self.tokens)

    def learnable(self, rollouts: Rollouts) -> tuple[bool, ...]:
        """Which completions have a weight at all."""
        return rollouts.answered

    def weights(self, rollouts: Rollouts) -> tuple[float, ...]:
        """Weight of each supervised token of a completion, before the one division by `divisor` over the step.

        0 where nothing can be learned.
        """
        counts = self.supervised(rollouts)
        per_token = [1.0 if self.reduction == "token_mean" else 1.0 / max(1, count) for count in counts]
        return tuple(weight * known for weight, known in zip(per_token, self.learnable(rollouts), strict=True))

    def divisor(self, rollouts: Rollouts) -> float:
        """What these rollouts add to the divisor of the step.

        `token_mean`: the supervised tokens. `sequence_mean`: the completions that have any (the paper's Eq. 6).
        """
        known = self.learnable(rollouts)
        counts = [n * ok for n, ok in zip(self.supervised(rollouts), known, strict=True)]
        return float(sum(counts) if self.reduction == "token_mean" else sum(count > 0 for count in counts))
