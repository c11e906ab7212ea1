# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""RIDE, arXiv:2609.36484: match hidden states beyond the teacher, along the way it came from its own base model.

    target = h_T + (lambda - 1) (h_T - h_B)        h_B: the state of the model before the teacher was trained
    loss_t = mean over matched blocks l of (1/D) ||h_student(l, t) - sg(target(l, t))||^2

at the positions of the sampled tokens. lambda = 1 is OPRD. Student, teacher and base are of one lineage: the difference of
two states only means something between models that were trained from each other.
"""

from typing import ClassVar, Literal, Self

from jaxtyping import Float
from torch import Tensor

from oprd.errors import TeacherMismatch
from oprd.losses.divergences import hidden_mse
from oprd.models.loading import ModelFacts, missing_in_common
from oprd.objectives.oprd import StateObjective
from oprd.section import Rate
from oprd.types import HiddenStates, Taps, Targets


class RIDE(StateObjective):
    """RIDE: OPRD with a target extrapolated beyond the teacher. Defaults are the paper's."""

    type: Literal["ride"] = "ride"
    base: str | None = None
    """Model the teacher was trained from, by folder or Hub name. None: the initial student."""
    extrapolation: Rate = 1.25
    """lambda: 1 is OPRD, above 1 goes beyond the teacher."""

    name: ClassVar[str] = "ride"

    def bind(self, student: ModelFacts) -> Self:
        missing = {} if self.base is None else missing_in_common(student, ModelFacts.read(self.base))
        if missing:
            raise TeacherMismatch(
                f"objective.base must be of the student's shape and tokenizer: {'; '.join(missing.values())}. Give the model "
                "that the teacher was trained from, or drop `base` for the initial student"
            )
        return super().bind(student)

    @property
    def reference_taps(self) -> Taps:
        return self.student_taps

    @property
    def reference(self) -> str | None:  # type: ignore[override]
        return self.base

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Mean squared difference to the extrapolated state of each token, averaged over the matched blocks."""
        return self._mean_over_blocks(self._distance, student, targets.teacher, targets.reference)

    def _distance(
        self, student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"], base: Float[Tensor, "N D"]
    ) -> Float[Tensor, " N"]:
        target = teacher.float() + (self.extrapolation - 1) * (teacher.float() - base.float())
        return hidden_mse(student, target)
