# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""OPD: on-policy distillation in output space. GKD, arXiv:2306.13649, and its descendants.

p = student, q = teacher, at the position that predicts the sampled token. Three estimators, one class each:

    OPD         exact over the vocabulary
    OPDTopK     both distributions renormalised on a support of k tokens
    OPDSampled  from the sampled token alone

Across tokenizers only sampled reverse KL is left, since the others sum over one vocabulary. What both models then give a
probability is the text between two places where both tokenizations end; each sums its own tokens' log-probabilities
there. The teacher's is that of one spelling in tokens, a lower bound of the text's.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.errors import ConfigError
from oprd.losses import divergences
from oprd.losses.chunked import same_rows
from oprd.losses.divergences import shared, token_logprobs, where_shared
from oprd.losses.support import logits_at, top_ids
from oprd.models.loading import ModelFacts
from oprd.objectives.base import OutputObjective
from oprd.progress import console
from oprd.section import Field, PositiveInt, Rate, Section
from oprd.types import Capability, HiddenStates, LMHead, Rollouts, Targets

C = Capability
Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student logits [C, V], teacher logits [C, V]) -> [C]."""


def has_kernel(logits: Tensor) -> bool:
    """Whether a Triton kernel may compute divergences of these logits."""
    return logits.is_cuda and logits.dtype == torch.float32 and find_spec("triton") is not None


@cache
def kernel(divergence: Divergence, teacher_share: float, device: torch.device) -> Divergence:
    """The Triton kernel of this divergence if, on a few rows on this device, it gives the definition's values and gradients;
    else the definition, and why is said. A compiler or a GPU that nobody has tried cannot change a loss."""
    try:
        fused = partial(import_module("oprd.losses.fused").divergence, teacher_share=teacher_share)
        rows = torch.randn(2, 4, 5000, generator=torch.Generator().manual_seed(0)).to(device)
        found = []
        for function in (fused, divergence):
            with torch.enable_grad():
                student = rows[0].clone().requires_grad_()
                values = function(student, rows[1])
                found.append((values.detach(), *torch.autograd.grad(values.sum(), student)))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    except Exception as error:
        console.print(f"The Triton kernel of exact divergences is not used: {error}", markup=False, highlight=False)
        return divergence
    return fused


@cache
def _jsd(teacher_share: float) -> Divergence:
    return lambda p, q: divergences.jsd(p, q, teacher_share)


class JSD(Section):
    """Generalised Jensen-Shannon divergence: b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p."""

    type: Literal["jsd"] = "jsd"
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """b."""


class _Divergence(OutputObjective):
    """What the estimators share: which divergence they estimate."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] | JSD = "reverse_kl"
    """reverse_kl = KL(p || q), forward_kl = KL(q || p), jsd with weight 0.5, or `{type: jsd, weight: b}`."""

    name: ClassVar[str] = "opd"

    @property
    def metric(self) -> str:
        """The divergence: `train/reverse_kl/mean`."""
        return self.divergence if isinstance(self.divergence, str) else self.divergence.type

    @property
    def _jsd_weight(self) -> float:
        return 0.5 if isinstance(self.divergence, str) else self.divergence.weight


class _Distributions(_Divergence):
    """What the estimators on distributions share."""

    kl_temperature: Rate = 1.0
    """Divides both models' logits in the loss. Not the sampling temperature; no factor is put back."""

    def _exact(self, student: Float[Tensor, "C K"], teacher: Float[Tensor, "C K"]) -> Float[Tensor, " C"]:
        p, q = student / self.kl_temperature, teacher / self.kl_temperature
        exact, share = {
            "reverse_kl": (divergences.reverse_kl, 1.0),
            "forward_kl": (divergences.forward_kl, 0.0),
            "jsd": (_jsd(self._jsd_weight), self._jsd_weight),
        }[self.metric]
        return (kernel(exact, share, p.device) if has_kernel(p) else exact)(p, q)


class OPD(_Distributions):
    """OPD, exact: divergence of the next-token distributions over the whole vocabulary."""

    type: Literal["opd"] = "opd"

    requires: ClassVar[frozenset[Capability]] = frozenset({C.DISTRIBUTIONS, C.SAME_TOKENIZER})

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Divergence of each token, in nats."""
        return self._of_logits(self._exact, student, teacher=targets.teacher)


class OPDTopK(_Distributions):
    """OPD on a support of k tokens: both distributions are renormalised on it."""

    type: Literal["opd_top_k"] = "opd_top_k"
    k: PositiveInt = 16
    """Tokens of the support."""
    support: Literal["student", "teacher", "overlap"] = "student"
    """Whose k most probable tokens; `overlap`: the student's that are also among the teacher's."""

    name: ClassVar[str] = "opd_top_k"

    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        return frozenset({C.TOP_K if self.support == "teacher" else C.DISTRIBUTIONS, C.SAME_TOKENIZER})

    @property
    def top_k_of_teacher(self) -> int:  # type: ignore[override]
        return self.k

    def bind(self, student: ModelFacts) -> Self:
        if self.k > student.vocabulary:
            raise ConfigError(f"objective.k is {self.k}; the vocabulary has {student.vocabulary} tokens")
        return super().bind(student)

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Divergence of each token on the support, in nats."""
        (spec,) = self.student_taps.hidden
        hidden, head = student.hidden[spec], cast(LMHead, student.head)
        if targets.logprobs is not None:
            rows, given = student.batch.selected(self.tokens), targets.logprobs
            ids, q = given.top_ids[rows][:, : self.k], given.top_logprobs[rows][:, : self.k]
            return self._exact(logits_at(hidden, head, ids), q)
        teacher = cast(HiddenStates, targets.teacher)
        head, teacher_head = same_rows(head, cast(LMHead, teacher.head))
        theirs = teacher.hidden[spec].to(hidden.device), teacher_head
        ids = top_ids(*(theirs if self.support == "teacher" else (hidden, head)), self.k)
        with torch.no_grad():
            q = logits_at(*theirs, ids)
        p = logits_at(hidden, head, ids)
        if self.support == "overlap":
            p, q = where_shared(p, q, shared(ids, top_ids(*theirs, self.k)))
        return self._exact(p, q)


class OPDSampled(_Divergence):
    """OPD from the sampled token: an unbiased estimate of the divergence and of its gradient, given the prefix."""

    type: Literal["opd_sampled"] = "opd_sampled"
    redraw: bool = False
    """Draw the token again from the student at every position instead of taking the trajectory's: unbiased on any
    trajectory, such as a teacher's."""

    name: ClassVar[str] = "opd_sampled"

    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        if self.redraw:
            return frozenset({C.DISTRIBUTIONS, C.SAME_TOKENIZER})
        across = () if self.metric == "reverse_kl" else (C.SAME_TOKENIZER,)
        return frozenset({C.LOGPROBS, C.ON_POLICY, *across})

    @property
    def importance_weighted(self) -> bool:  # type: ignore[override]
        return not self.redraw

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """Estimate of each token's divergence, in nats. Across tokenizers a span's is at its last token, 0 elsewhere."""
        if student.batch.alignments is not None:
            return self._per_span(student, targets)
        ids = student.batch.sampled_ids(self.tokens)
        if self.redraw:
            uniform = torch.rand(len(ids)).to(ids.device)
            return self._of_logits(self._redrawn, student, uniform, teacher=targets.teacher)
        if targets.logprobs is not None:
            given = targets.logprobs.sampled[student.batch.selected(self.tokens)]
            values = self._of_logits(
                lambda p, _, ids, log_q: self._estimate(token_logprobs(p, ids), log_q), student, ids, given
            )
        else:
            values = self._of_logits(self._sampled, student, ids, teacher=targets.teacher)
        weights = self._importance_weights(student)
        return values if weights is None else weights * values

    def _token_weights(self, rollouts: Rollouts) -> list[Sequence[float]]:
        if rollouts.alignments is None:
            return super()._token_weights(rollouts)
        whole = []
        for alignment in rollouts.alignments:
            start, _ = self.tokens.span(alignment.student_length)
            # a span that begins before the selection is not seen whole
            ends = pairwise((-1, *alignment.student_index))
            whole.append({end for before, end in ends if before + 1 >= start})
        return self._weights_within(rollouts, whole)

    def _per_span(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        assert targets.logprobs is not None
        batch = student.batch
        ids, spans, ends = batch.sampled_ids(self.tokens), batch.spans(self.tokens), batch.aligned(self.tokens)
        log_p = self._of_logits(lambda p, _, ids: token_logprobs(p, ids), student, ids)
        inside = spans >= 0
        of_span = log_p.new_zeros(int(ends.sum())).index_add(0, spans[inside], log_p[inside])
        log_q = targets.logprobs.sampled[batch.selected(self.tokens)][ends]
        return log_p.new_zeros(len(log_p)).masked_scatter(ends, self._estimate(of_span, log_q.to(of_span)))

    def _estimate(self, log_p: Float[Tensor, " C"], log_q: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
        if self.metric == "jsd":
            return divergences.sampled_jsd(log_p, log_q, self._jsd_weight)
        if self.metric == "reverse_kl":
            return divergences.sampled_reverse_kl(log_p, log_q)
        return divergences.sampled_forward_kl(log_p, log_q)

    def _sampled(self, p: Tensor, q: Tensor, ids: Tensor) -> Tensor:
        return self._estimate(token_logprobs(p, ids), token_logprobs(q, ids))

    def _redrawn(self, p: Tensor, q: Tensor, uniform: Tensor) -> Tensor:
        return self._sampled(p, q, divergences.draw(p, uniform))
