# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""What an objective is: the fields of a recipe and one equation."""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import PrivateAttr
from torch import Tensor

from oprd.distributed import Ranks
from oprd.errors import TeacherMismatch
from oprd.losses.chunked import RowFunction, chunked
from oprd.losses.importance import IMPORTANCE_CLIP, off_policy_weights
from oprd.models.language_model import LanguageModel, Model
from oprd.models.loading import ModelFacts
from oprd.section import Section, Tokens, Weight, WeightSchedule
from oprd.teacher.base import Teacher
from oprd.types import Capability, HiddenSpec, HiddenStates, Metric, Rollouts, Taps, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Whom an objective may ask once per step."""

    student: Model
    teacher: Teacher
    ranks: Ranks
    micro_batch_tokens: int


class Objective(Section, ABC):
    """One term of the loss. Fields are its hyper-parameters; `per_token` is its equation.

    A recipe holds it unbound; `bind` returns the copy that training uses, which knows the student and may hold tensors.
    """

    weight: Weight = 1.0
    """Factor of this term in the sum: a number, or `{from: 1, to: 0, steps: 10}`."""
    tokens: Tokens = "all"  # type: ignore[assignment]
    """Supervised tokens: `all`, `{first: k}` or `{last: k}`, cut to the completion's length."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """`token_mean`: mean over all supervised tokens of the step. `sequence_mean`: mean over completions of their token
    means (Eq. 6 of arXiv:2606.06021)."""

    name: ClassVar[str]
    """The metric's name: `train/NAME/mean`."""
    requires: ClassVar[frozenset[Capability]]
    """What teacher and source must provide; an instance may override it where its fields matter."""
    writes_scores: ClassVar[bool] = False
    """True if `annotate` sets `token_scores`: one such objective per recipe."""
    importance_weighted: ClassVar[bool] = False
    """True if off-policy rollouts need importance weights, and so the log-probabilities at sampling time."""
    top_k_of_teacher: ClassVar[int] = 0
    """Most probable tokens of each position that a server is asked for."""
    reference: ClassVar[str | None] = None
    """Model that the reference is; None: the initial student."""

    _counts: dict[str, tuple[float, float | None]] = PrivateAttr(default_factory=dict)
    _student: ModelFacts = PrivateAttr()

    def bind(self, student: ModelFacts) -> Self:
        """The objective for this student. Raises ConfigError for what does not fit its blocks, width or vocabulary."""
        bound = self.model_copy(deep=True)
        bound._student = student
        return bound

    @property
    @abstractmethod
    def student_taps(self) -> Taps:
        """What is tapped off the student."""

    @property
    def teacher_taps(self) -> Taps:
        """What is tapped off a local teacher; the student's taps unless overridden."""
        return self.student_taps

    @property
    def reference_taps(self) -> Taps:
        """What is tapped off the reference; nothing unless overridden."""
        return Taps()

    @property
    def metric(self) -> str:
        """The loss's name in the metrics: `train/METRIC/mean`."""
        return self.name

    def check_lengths(self, shortest: int) -> None:
        """Raise ConfigError if nothing can be learned on completions of `shortest` tokens, the least limit of the run."""

    def check_pair_facts(self, student: ModelFacts, teacher: ModelFacts) -> None:
        """Raise TeacherMismatch for a pair of models that this objective was not prepared for. Before loading."""

    def check_models(self, student: LanguageModel, teacher: LanguageModel | None) -> None:
        """The same after loading, by weights. `teacher` is None where it is not in this process."""

    def summary(self) -> dict[str, Any]:
        """What the run folder keeps about the bound objective, as JSON; empty for most."""
        return {}

    def annotate(self, rollouts: Rollouts, context: StepContext) -> Rollouts:
        """Called once per step with this rank's rollouts: what asks the teacher in text asks here, all at once."""
        return rollouts

    @abstractmethod
    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """One value per supervised token. Gradient flows to the student only; nothing is averaged here."""

    def weights(self, rollouts: Rollouts) -> Float[Tensor, " N"]:
        """Share of each supervised token in the step's sum, before the one division by `total_weight`. In float32."""
        rows = self._token_weights(rollouts)
        if self.reduction == "sequence_mean":
            rows = [[x / max(1e-9, sum(row)) for x in row] for row in rows]
        return torch.tensor([x for row in rows for x in row], dtype=torch.float32)

    def total_weight(self, rollouts: Rollouts) -> float:
        """What these rollouts add to the divisor: the sum of token weights, or the completions that have any."""
        rows = self._token_weights(rollouts)
        return float(sum(any(row) for row in rows) if self.reduction == "sequence_mean" else sum(map(sum, rows)))

    def weight_at(self, step: int) -> float:
        """The term's weight at a step, counted from 1."""
        return self.weight.at(step) if isinstance(self.weight, WeightSchedule) else self.weight

    def take_metrics(self) -> tuple[Metric, ...]:
        """What was counted since the last call; the same names on every rank."""
        taken, self._counts = self._counts, {}
        return tuple(Metric(name=name, sum=total, count=count) for name, (total, count) in taken.items())

    def _token_weights(self, rollouts: Rollouts) -> list[Sequence[float]]:
        """Weight of every supervised token by completion: the rollouts' own, 1 where they have none."""
        given = rollouts.token_weights or tuple((1.0,) * length for length in rollouts.lengths)
        return [row[slice(*self.tokens.span(len(row)))] for row in given]

    def _weights_within(self, rollouts: Rollouts, kept: Sequence[Container[int]]) -> list[Sequence[float]]:
        """Token weights, 0 outside the `kept` positions of each completion."""
        rows = zip(Objective._token_weights(self, rollouts), rollouts.lengths, kept, strict=True)
        return [[x * (at in own) for at, x in enumerate(row, self.tokens.span(n)[0])] for row, n, own in rows]

    def _count(self, name: str, total: float, count: float | None = None) -> None:
        """Add to a metric of the step: one number, however many micro-batches."""
        total_before, count_before = self._counts.get(name, (0.0, None))
        self._counts[name] = total_before + total, None if count is None else (count_before or 0.0) + count


class OutputObjective(Objective):
    """An objective on next-token distributions, at the positions that predict the supervised tokens."""

    @cached_property
    def student_taps(self) -> Taps:
        return Taps(hidden=(HiddenSpec(block="last", at="predicting", tokens=self.tokens),), head=True)

    def _of_logits(
        self, row_function: RowFunction, student: HiddenStates, *arguments: Tensor, teacher: HiddenStates | None = None
    ) -> Float[Tensor, " N"]:
        """`row_function` of the student's logits, the teacher's if one is given, and the arguments."""
        (spec,) = self.student_taps.hidden
        assert student.head is not None
        return chunked(
            row_function, student.hidden[spec], student.head, *arguments,
            teacher_hidden=None if teacher is None else teacher.hidden[spec],
            teacher_head=None if teacher is None else teacher.head,
        )  # fmt: skip

    def _importance_weights(self, student: HiddenStates, counted: Tensor | None = None) -> Tensor | None:
        """Weights of tokens sampled under earlier weights, None if on-policy; the share that is clipped goes to the metrics."""
        weights = off_policy_weights(student, self.student_taps.hidden[0])
        if weights is not None:
            clipped = (weights if counted is None else weights[counted]) >= IMPORTANCE_CLIP
            self._count(f"train/{self.metric}/clipped/share", float(clipped.sum()), len(clipped))
        return weights


def check_pair(
    objective: Objective, provides: frozenset[Capability], why_not: Mapping[Capability, str], teacher: str
) -> None:
    """Raise TeacherMismatch unless everything the objective requires is provided. The only check of a pair."""
    missing = sorted(objective.requires - provides)
    if missing:
        needs = " and ".join(f"{c} ({why_not[c]})" if c in why_not else str(c) for c in missing)
        raise TeacherMismatch(
            f"objective {objective.name!r} needs {needs}; teacher {teacher!r} with this source provides "
            f"{', '.join(sorted(provides)) or 'nothing'}. {' '.join(dict.fromkeys(ADVICE[c] for c in missing))}"
        )


_SERVED = "Use a local teacher, or an objective that a server can serve: 'omni_opd', 'opd_sampled', or 'opd_top_k' with support 'teacher'."
_ANY = "objective 'opd' compares models of any shape, 'oprd_bridge' of any shape and tokenizer."
ADVICE = {
    Capability.HIDDEN: _SERVED,
    Capability.DISTRIBUTIONS: _SERVED,
    Capability.LOGPROBS: "Give the server's tokenizer, or use a local teacher.",
    Capability.TOP_K: "Give the server's tokenizer, or use a local teacher.",
    Capability.TEXT: "Use a teacher that writes: 'local', 'self' or 'server'.",
    Capability.SAME_SHAPE: f"Use a teacher of the student's shape; {_ANY}",
    Capability.SAME_TOKENIZER: f"Use a teacher with the student's tokenizer; {_ANY}",
    Capability.ONE_MODEL: "Use `teacher: {type: local}`.",
    Capability.ON_POLICY: "Set sampling_temperature, top_p and lambda_on_policy to 1 and source to 'student', or set redraw: true, or use 'opd' or 'opd_top_k'.",
    Capability.TEACHER_TEXT: "Set rollout.source to 'teacher', 'rewrite' or 'dataset'.",
}  # fmt: skip
