# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Negative log-likelihood of text that somebody else wrote: sequence distillation, and MPD with a text-only teacher."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from oprd.losses.divergences import token_logprobs
from oprd.objectives.base import OutputObjective
from oprd.types import Capability, HiddenStates, Rollouts, Taps, Targets


class NLL(OutputObjective):
    """-log p(y_t) on completions by the teacher or the dataset. The student's own have weight 0."""

    type: Literal["nll"] = "nll"

    name: ClassVar[str] = "nll"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.TEACHER_TEXT})

    @property
    def teacher_taps(self) -> Taps:
        return Taps()

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Negative log-likelihood of each token, in nats. `targets` are not looked at: the teacher's word is the text."""
        ids = student.batch.sampled_ids(self.tokens)
        return self._of_logits(lambda p, _, ids: -token_logprobs(p, ids), student, ids)

    def _token_weights(self, rollouts: Rollouts) -> list[Sequence[float]]:
        # the gradient of the likelihood of the student's own text is noise around zero
        learned = rollouts.rewritten or (rollouts.written_by != "student",) * len(rollouts)
        rows = zip(super()._token_weights(rollouts), learned, strict=True)
        return [row if learn else [0.0] * len(row) for row, learn in rows]
