# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""OPRD-Bridge as published, arXiv:2606.06021: match projections of the two models' hidden states.

    u = P_S (h_S - mean_S),  v = P_T (h_T - mean_T)  in R^r
    loss_t = mean over block pairs of (1/r) ||u/|u| - sg(v/|v|)||^2

P_T holds the teacher's principal directions, P_S the ridge regression of v on h_S, both from the file that `oprd fit-bridge`
writes. Tokens without an aligned teacher token have weight 0.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.solve import BlockMap, Solution
from oprd.losses.divergences import normalized_hidden_mse
from oprd.objectives.oprd_bridge import BridgeObjective
from oprd.section import Layers, PositiveInt
from oprd.types import HiddenStates, Rollouts, Targets


class OPRDBridgePublished(BridgeObjective):
    """OPRD-Bridge as published: match low-rank projections of the hidden states. Defaults are the paper's.

    Needs `oprd fit-bridge` first; its fit is linear and uses all aligned tokens.
    """

    type: Literal["oprd_bridge_published"] = "oprd_bridge_published"
    rank: Literal["full", "auto"] | PositiveInt = 8
    layers: Layers = "all"

    name: ClassVar[str] = "oprd_bridge_published"
    features: ClassVar[int] = 0
    confidence: ClassVar[float] = 0.0

    def block_map(self, solution: Solution, rank: int) -> BlockMap:
        """Projections on the teacher's principal directions."""
        return solution.projections.first(rank)

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Mean squared difference of the normalised projections, averaged over the pairs of blocks."""
        assert targets.teacher is not None
        aligned, distances = student.batch.aligned(self.tokens), []
        for block, other in self._pairs:
            maps = self._map(block, aligned.device)
            u = maps.of_student(student.hidden[self._spec(block)])
            v = torch.zeros_like(u)  # stays 0 where the weight is 0
            v[aligned] = maps.of_teacher(targets.teacher.hidden[self._spec(other)].to(u.device))
            distances.append(normalized_hidden_mse(u, v))
        return torch.stack(distances).mean(0)

    def _token_weights(self, rollouts: Rollouts) -> list[Sequence[float]]:
        if rollouts.alignments is None:
            return super()._token_weights(rollouts)
        return self._weights_within(rollouts, [set(alignment.student_index) for alignment in rollouts.alignments])
