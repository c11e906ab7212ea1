"""OPD: on-policy distillation in output space. GKD, arXiv 2306.13649, and its descendants.

p = student, q = teacher, both at the position that predicts the sampled token. Estimators: `full` over the vocabulary,
`top_k` with both distributions renormalised on a support of k tokens, `sampled` from the sampled token alone.

Across tokenizers [ours] only sampled reverse KL is left: the others sum over one vocabulary that both share. What both
models give a probability is then the text between two places where both tokenizations end; each sums its own tokens'
log-probabilities there. The teacher's is that of one spelling in tokens, a lower bound of the text's.
"""

from functools import partial
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.config.objectives import OutputKLConfig
from oprd.errors import ConfigError
from oprd.kernels import reference
from oprd.kernels.chunked import Divergence, head_divergence, head_logprobs
from oprd.kernels.reference import token_logprobs
from oprd.objectives.base import Objective
from oprd.objectives.stale import ImportanceWeights
from oprd.types import (
    HiddenTargets,
    LMHead,
    MicroBatch,
    Reading,
    SampledTargets,
    States,
    Tally,
    TeacherTargets,
    TokenSelection,
    TopKTargets,
)

EXACT = {"reverse_kl": reference.reverse_kl, "forward_kl": reference.forward_kl, "jsd": reference.jsd}
SAMPLED = {
    "reverse_kl": reference.sampled_reverse_kl,
    "forward_kl": reference.sampled_forward_kl,
    "jsd": reference.sampled_jsd,
}


@final
class OutputKL(Objective):
    """Divergence between next-token distributions, from hidden states and LM heads, chunk by chunk."""

    uses_head = True
    across_shapes = True

    def __init__(self, config: OutputKLConfig, *, blocks: int, vocabulary: int) -> None:
        self.name = config.divergence
        self.tokens = TokenSelection.of(config.tokens, config.k)
        self.reduction = config.reduction
        self.coefficient = config.coefficient
        self.across_tokenizers = (
            config.estimator == "sampled" and config.divergence == "reverse_kl" and not config.redraw
        )
        at = "spans" if self.across_tokenizers else "prediction"
        self._reading = Reading(block="last", at=at, tokens=self.tokens)
        self.readings = (self._reading,)
        self._divergence = divergence(config, vocabulary)
        self._config = config
        self.needs = HiddenTargets
        if config.estimator == "sampled" and not config.redraw:
            self.needs = HiddenTargets | SampledTargets
        if config.estimator == "top_k" and config.support == "teacher":
            self.needs = HiddenTargets | TopKTargets
        # full and top_k sum over tokens with the student's own probabilities, and redrawn tokens are the student's of now;
        # only the sampled estimators need correction
        self.importance_weighted = config.estimator == "sampled" and not config.redraw
        self._importance = ImportanceWeights(self.name, config.importance_clip)

    def per_token(self, student: States, teacher: TeacherTargets) -> Float[Tensor, " N"]:
        assert student.head is not None
        if student.batch.places is not None:
            assert isinstance(teacher, HiddenTargets)
            assert teacher.head is not None
            assert teacher.batch is not None
            log_p = self._span_logprobs(student.hidden[self._reading], student.head, student.batch)
            log_q = self._span_logprobs(teacher.hidden[self._reading], teacher.head, teacher.batch)
            return reference.sampled_reverse_kl(log_p, log_q.to(log_p))
        ids = student.batch.sampled_ids(self.tokens)
        hidden = student.hidden[self._reading]
        if isinstance(teacher, HiddenTargets):
            assert teacher.head is not None
            # redrawn: a uniform number a token in the place of its id; the divergence draws with it, in any pass alike
            rows = torch.rand(len(ids)).to(ids.device) if self._config.redraw else ids
            values = head_divergence(
                hidden, student.head, teacher.hidden[self._reading], teacher.head, rows, self._divergence
            )
        else:
            rows = torch.arange(len(ids), device=ids.device)
            values = head_divergence(hidden, student.head, None, None, rows, self._served(student, teacher))
        weights = self._importance.of(student, self._reading) if self.importance_weighted else None
        return values if weights is None else weights * values

    def tallies(self) -> tuple[Tally, ...]:
        return self._importance.tallies()

    def _served(self, student: States, teacher: TeacherTargets) -> Divergence:
        """The divergence from what a server says, which covers every token of the completions, by token number."""
        selected = student.batch.selected(self.tokens)
        if isinstance(teacher, SampledTargets):
            ids, given = student.batch.sampled_ids(self.tokens), teacher.logprobs[selected]
            sampled = partial(SAMPLED[self._config.divergence], **_weight(self._config))
            return lambda p, _, rows: sampled(token_logprobs(p, ids[rows]), given[rows])
        assert isinstance(teacher, TopKTargets)
        top_ids, top_logprobs = teacher.ids[selected], teacher.logprobs[selected]
        exact, temperature = (
            partial(EXACT[self._config.divergence], **_weight(self._config)),
            self._config.kl_temperature,
        )
        return lambda p, _, rows: exact(p.gather(-1, top_ids[rows]) / temperature, top_logprobs[rows] / temperature)

    def _span_logprobs(self, hidden: Float[Tensor, "M D"], head: LMHead, batch: MicroBatch) -> Float[Tensor, " N"]:
        """Log-probability of each span between two pairs, summed over the model's own tokens of it, in nats."""
        logprobs = head_logprobs(hidden, head, batch.span_ids(self.tokens))
        numbers = batch.span_numbers(self.tokens)
        count = int(numbers[-1]) + 1 if len(numbers) else 0
        return logprobs.new_zeros(count).index_add(0, numbers, logprobs)


def _weight(config: OutputKLConfig) -> dict[str, float]:
    return {} if config.divergence != "jsd" else {"weight": config.jsd_weight or 0.5}


def divergence(config: OutputKLConfig, vocabulary: int) -> Divergence:
    """The configured divergence as a function of both models' logits and the sampled ids."""
    weight = _weight(config)
    top_k = config.top_k or 16
    if config.estimator == "top_k" and top_k > vocabulary:
        raise ConfigError(f"objective.top_k is {top_k}; the vocabulary has {vocabulary} tokens")

    exact = partial(EXACT[config.divergence], **weight)
    from_sample = partial(SAMPLED[config.divergence], **weight)

    def full(student: Float[Tensor, "C V"], teacher: Float[Tensor, "C V"], ids: Int[Tensor, " C"]) -> Tensor:
        return exact(student / config.kl_temperature, teacher / config.kl_temperature)

    def on_top_k(student: Float[Tensor, "C V"], teacher: Float[Tensor, "C V"], ids: Int[Tensor, " C"]) -> Tensor:
        support = config.support or "student"
        return full(*reference.on_top_k(student, teacher, top_k, support), ids)

    def sampled(student: Float[Tensor, "C V"], teacher: Float[Tensor, "C V"], ids: Int[Tensor, " C"]) -> Tensor:
        return from_sample(reference.token_logprobs(student, ids), reference.token_logprobs(teacher, ids))

    def redrawn(student: Float[Tensor, "C V"], teacher: Float[Tensor, "C V"], uniform: Float[Tensor, " C"]) -> Tensor:
        return sampled(student, teacher, reference.draw(student, uniform))

    if config.redraw:
        return redrawn
    return {"full": full, "top_k": on_top_k, "sampled": sampled}[config.estimator]
