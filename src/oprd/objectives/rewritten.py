"""Negative log-likelihood of text the teacher wrote: MPD with a text-only teacher [ours], and sequence distillation."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from oprd.config.objectives import RewrittenConfig
from oprd.kernels.chunked import head_divergence
from oprd.kernels.reference import token_logprobs
from oprd.objectives.base import Objective
from oprd.types import NotRewritten, Reading, Rollouts, States, TeacherTargets, TextTargets, TokenSelection


@final
class RewrittenNLL(Objective):
    """-log p(y_t) on the trajectory that the teacher put in place of the student's."""

    name = "nll"
    needs = TextTargets
    uses_head = True
    across_shapes = True
    across_tokenizers = True

    def __init__(self, config: RewrittenConfig, *, blocks: int, vocabulary: int) -> None:
        self.tokens = TokenSelection.of(config.tokens, config.k)
        self.reduction = config.reduction
        self.coefficient = config.coefficient
        self._reading = Reading(block="last", at="prediction", tokens=self.tokens)
        self.readings = (self._reading,)

    def per_token(self, student: States, teacher: TeacherTargets) -> Float[Tensor, " N"]:
        """Everything the teacher has to say is in the tokens; `teacher` is not looked at."""
        assert student.head is not None
        ids = student.batch.sampled_ids(self.tokens)
        hidden = student.hidden[self._reading]
        return head_divergence(hidden, student.head, None, None, ids, lambda p, _, ids: -token_logprobs(p, ids))

    def learnable(self, rollouts: Rollouts) -> tuple[bool, ...]:
        """Not the student's own text: the gradient of its likelihood is noise around zero."""
        answers = rollouts.answers or (None,) * len(rollouts)
        return tuple(not isinstance(answer, NotRewritten) for answer in answers)
