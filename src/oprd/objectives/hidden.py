"""OPRD-Vanilla: On-Policy Representation Distillation, arXiv 2606.06021.

    loss_t = mean over matched blocks l of (1/D) ||h_student(l, t) - sg(h_teacher(l, t))||^2

at the positions of the sampled tokens themselves [code]. No LM head takes part on either side.
"""

from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oprd.config.objectives import HiddenMSEConfig, Layers
from oprd.errors import ConfigError
from oprd.kernels.reference import hidden_mse, normalized_hidden_mse
from oprd.objectives.base import Objective
from oprd.types import HiddenTargets, Reading, States, TokenSelection


@final
class HiddenMSE(Objective):
    """Mean squared error between hidden states of the same block."""

    name = "oprd"
    needs = HiddenTargets
    uses_head = False

    def __init__(self, config: HiddenMSEConfig, *, blocks: int, vocabulary: int) -> None:
        self.tokens = TokenSelection.of(config.tokens, config.k)
        self.reduction = config.reduction
        self.coefficient = config.coefficient
        self.readings = tuple(
            Reading(block=block, at="completion", tokens=self.tokens) for block in select_blocks(config.layers, blocks)
        )
        self._distance = normalized_hidden_mse if config.normalization == "l2" else hidden_mse

    def per_token(self, student: States, teacher: HiddenTargets) -> Float[Tensor, " N"]:
        return torch.stack([self._block(student.hidden[r], teacher.hidden[r]) for r in self.readings]).mean(0)

    def _block(self, student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        # backward takes the difference anew from the two states, which are there anyway: kept for every block it would
        # be a third set of states
        return cast(
            Tensor,
            checkpoint(
                self._distance, student, teacher.to(student.device), use_reentrant=False, preserve_rng_state=False
            ),
        )


def select_blocks(layers: Layers, blocks: int) -> tuple[int, ...]:
    """Matched blocks, from 1, of a model that has `blocks`. Raises ConfigError for one it does not have."""
    if layers == "all":
        return tuple(range(1, blocks + 1))
    if layers == "last":
        return (blocks,)
    if isinstance(layers, str):
        first = 2 if layers == "even" else 1
        return tuple(range(first, blocks + 1, 2))
    beyond = [block for block in layers if block > blocks]
    if beyond:
        raise ConfigError(f"objective.layers names block {beyond[0]}; the student has blocks 1 to {blocks}")
    return tuple(sorted(layers))
