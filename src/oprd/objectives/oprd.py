# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""OPRD-Vanilla: On-Policy Representation Distillation, arXiv:2606.06021.

    loss_t = mean over matched blocks l of (1/D) ||h_student(l, t) - sg(h_teacher(l, t))||^2

at the positions of the sampled tokens themselves. No LM head takes part on either side.
"""

from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, Literal, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oprd.errors import ConfigError
from oprd.losses.divergences import hidden_mse, normalized_hidden_mse
from oprd.models.loading import ModelFacts
from oprd.objectives.base import Objective
from oprd.section import Layers, Tokens
from oprd.types import Capability, HiddenSpec, HiddenStates, Taps, Targets, TokenSelection


class StateObjective(Objective):
    """An objective on hidden states: which blocks it matches."""

    layers: Layers = "all"
    """The student's blocks to match, counted from 1: `all`, `last`, `even`, `odd` or a list."""
    tokens: Tokens = TokenSelection(keep="last", k=2000)

    requires: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.HIDDEN, Capability.SAME_SHAPE, Capability.SAME_TOKENIZER}
    )

    def bind(self, student: ModelFacts) -> Self:
        """Raises ConfigError for a block that the student does not have."""
        select_blocks(self.layers, student.blocks)
        return super().bind(student)

    @cached_property
    def student_taps(self) -> Taps:
        blocks = select_blocks(self.layers, self._student.blocks)
        return Taps(hidden=tuple(HiddenSpec(block=b, at="token", tokens=self.tokens) for b in blocks))

    def _mean_over_blocks(
        self, distance: Callable[..., Tensor], student: HiddenStates, *others: HiddenStates | None
    ) -> Float[Tensor, " N"]:
        """`distance` between the models' states, computed once more in backward: kept for every block, the differences
        would be one more set of hidden states."""
        losses = []
        for spec in self.student_taps.hidden:
            ours = student.hidden[spec]
            theirs = (cast(HiddenStates, other).hidden[spec].to(ours.device) for other in others)
            losses.append(checkpoint(distance, ours, *theirs, use_reentrant=False, preserve_rng_state=False))
        return torch.stack(losses).mean(0)


class OPRD(StateObjective):
    """OPRD: match the student's hidden states to the teacher's. Defaults are the paper's."""

    type: Literal["oprd"] = "oprd"
    normalization: Literal["none", "l2"] = "none"
    """`l2` divides each state by its norm first, and then needs a weight of 100 to 1000."""

    name: ClassVar[str] = "oprd"

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Mean squared difference of each token, averaged over the matched blocks."""
        distance = normalized_hidden_mse if self.normalization == "l2" else hidden_mse
        return self._mean_over_blocks(distance, student, targets.teacher)


def select_blocks(layers: Layers, blocks: int) -> tuple[int, ...]:
    """Matched blocks, from 1, of a model with `blocks`. Raises ConfigError for one it does not have."""
    if isinstance(layers, str):
        start, step = {"all": (1, 1), "last": (blocks, 1), "even": (2, 2), "odd": (1, 2)}[layers]
        return tuple(range(start, blocks + 1, step))
    beyond = [block for block in layers if block > blocks]
    if beyond:
        raise ConfigError(f"objective.layers names block {beyond[0]}; the student has blocks 1 to {blocks}")
    return tuple(sorted(layers))
