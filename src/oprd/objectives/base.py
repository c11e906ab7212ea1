"""What the loop asks of an objective."""

from abc import ABC, abstractmethod
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from oprd.config import Tokens
from oprd.types import Reading, States, TeacherTargets, TokenSelection

LAST_K = 2000
"""Supervised tokens of a completion under first_k and last_k unless given [paper]."""


class Objective(ABC):
    """Compares what was read off the student with what the teacher says, token by token."""

    name: str
    """The metric's name: `train/NAME/mean`."""
    needs: type
    """The target type it needs."""
    readings: tuple[Reading, ...]
    """Hidden states it needs of the student, and of a teacher that gives HiddenTargets."""
    uses_head: bool
    """Whether the LM heads take part."""
    tokens: TokenSelection
    """Supervised tokens of each completion."""
    reduction: Literal["token_mean", "sequence_mean"]
    coefficient: float

    @abstractmethod
    def per_token(self, student: States, teacher: TeacherTargets) -> Float[Tensor, " N"]:
        """One value per supervised token. Gradient flows to the student only; nothing is averaged here."""

    def weights(self, lengths: tuple[int, ...]) -> tuple[float, ...]:
        """Weight of each supervised token of a completion, before the one division by their total over the step.

        `token_mean`: 1 each, so the total is the number of supervised tokens. `sequence_mean`: one over the completion's
        supervised tokens, so the total is the number of completions that have any (the paper's Eq. 6).
        """
        if self.reduction == "token_mean":
            return tuple(1.0 for _ in lengths)
        return tuple(1.0 / max(1, self.tokens.count(length)) for length in lengths)


def token_selection(tokens: Tokens, k: int | None) -> TokenSelection:
    """The selection a config asks for."""
    return TokenSelection(keep=tokens, k=(k or LAST_K) if tokens.endswith("_k") else 0)
