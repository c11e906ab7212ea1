"""OmniOPD: a teacher that gives text only, arXiv 2606.01476 [second-hand].

    loss_t = -(pi_hat - baseline) log p(y_t)      inside the audited chunks
             beta KL(p_start || p)                elsewhere, over the whole vocabulary

summed over tokens and divided by the completions of the step: a token mean would let the audited share move the
learning rate. pi_hat comes from `teacher/audit.py` and is held fixed. The baseline is ours.
"""

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.config.objectives import OmniOPDConfig
from oprd.kernels.chunked import head_divergence
from oprd.kernels.reference import forward_kl, token_logprobs
from oprd.objectives.base import Objective
from oprd.objectives.stale import ImportanceWeights
from oprd.types import ChunkTargets, Reading, Rollouts, States, Tally, TokenSelection


@final
class OmniOPD(Objective):
    """Reinforces the chunks the teacher would have written too, and holds the rest where it was."""

    name = "omni_opd"
    needs = ChunkTargets
    uses_head = True
    across_shapes = True
    across_tokenizers = True
    reduction = "token_mean"
    importance_weighted = True

    def __init__(self, config: OmniOPDConfig, *, blocks: int, vocabulary: int) -> None:
        self.tokens = TokenSelection.of(config.tokens, config.k)
        self.coefficient = config.coefficient
        self._anchor = config.anchor
        self._reading = Reading(block="last", at="prediction", tokens=self.tokens)
        self.readings = (self._reading,)
        self._importance = ImportanceWeights(self.name)

    def per_token(self, student: States, teacher: ChunkTargets) -> Float[Tensor, " N"]:
        assert student.head is not None
        ids = student.batch.sampled_ids(self.tokens)
        hidden = student.hidden[self._reading]
        selected = student.batch.selected(self.tokens)
        audited, scores = teacher.audited[selected], teacher.scores[selected]
        weights = self._importance.of(student, self._reading, used=audited)
        if weights is not None:
            scores = weights * scores

        def loss(p: Float[Tensor, "C V"], start: Any, rows: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
            reinforced = -scores[rows] * token_logprobs(p, ids[rows])
            if start is None:
                return reinforced
            return torch.where(audited[rows], reinforced, self._anchor * forward_kl(p, start))

        rows = torch.arange(len(ids), device=ids.device)
        start_hidden = None if teacher.start is None else teacher.start.hidden[self._reading]
        start_head = None if teacher.start is None else teacher.start.head
        return head_divergence(hidden, student.head, start_hidden, start_head, rows, loss)

    def tallies(self) -> tuple[Tally, ...]:
        return self._importance.tallies()

    def weights(self, rollouts: Rollouts) -> tuple[float, ...]:
        """1 everywhere: a dropped chunk has no score, and the anchor holds whatever the teacher says."""
        return (1.0,) * len(rollouts)

    def divisor(self, rollouts: Rollouts) -> float:
        return float(len(rollouts))
