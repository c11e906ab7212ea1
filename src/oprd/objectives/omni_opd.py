# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""OmniOPD: a teacher that gives text only, arXiv:2606.01476.

    pi_hat = (k + alpha pi_bar) / (N + alpha)     of each audited chunk; k = sum of similarities to N continuations
    loss_t = -(pi_hat - baseline) log p(y_t)      inside the audited chunks
             beta KL(p_initial || p)              elsewhere, over the whole vocabulary

summed over tokens and divided by the completions of the step: a token mean would let the audited share move the learning
rate. Chunks start where the student's entropy is highest. The teacher continues the student's text from there, N times,
without seeing the chunk. The baseline is ours: without one the loss only ever reinforces.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import model_validator
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oprd.data.batching import rows_by_tokens, student_batch
from oprd.data.chat import decode_written
from oprd.distributed import Ranks
from oprd.errors import ConfigError
from oprd.losses.chunked import statistics
from oprd.losses.divergences import entropy, forward_kl, token_logprobs
from oprd.objectives.base import OutputObjective, StepContext
from oprd.section import Field, NonNegativeFloat, PositiveInt
from oprd.teacher.base import GenerationRequest
from oprd.types import ALL_TOKENS, Capability, HiddenSpec, HiddenStates, Rollouts, Taps, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """An audited chunk of one completion and how the teacher's continuations compare with it."""

    row: int
    start: int
    similarities: tuple[float, ...]
    mean_logprob: float
    """Of the chunk's tokens under the student, in nats."""

    def target(self, prior: float) -> float:
        """pi_hat: posterior mean of a Dirichlet-multinomial whose prior, of weight `prior`, is the student."""
        k, n = sum(self.similarities), len(self.similarities)
        return (k + prior * float(torch.tensor(self.mean_logprob).exp())) / (n + prior)


class OmniOPD(OutputObjective):
    """OmniOPD: reinforce the chunks that the teacher would have written too, and anchor the rest to the initial student."""

    type: Literal["omni_opd"] = "omni_opd"
    chunks: PositiveInt = 10
    """Audited chunks of a completion, at most: M."""
    chunk_tokens: PositiveInt = 50
    """C."""
    continuations: PositiveInt = 10
    """The teacher's, of each audited prefix: N."""
    teacher_temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Not published; greedy continuations would all be the same."""
    prior: NonNegativeFloat = 1.0
    """Weight of the student's own probability in the target, in continuations: alpha."""
    anchor: NonNegativeFloat = 0.1
    """Coefficient of KL(initial student || student) outside the audited chunks: beta."""
    baseline: Literal["none", "batch_mean", "leave_one_out"] = "batch_mean"
    """Subtracted from the targets: nothing (as published), their mean over the step, or over the prompt's other
    completions."""
    reduction: Literal["completion_sum"] = "completion_sum"  # type: ignore[assignment]
    """Sum over tokens, mean over completions."""

    name: ClassVar[str] = "omni_opd"
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.TEXT})
    importance_weighted: ClassVar[bool] = True
    writes_scores: ClassVar[bool] = True

    @model_validator(mode="after")
    def _room_for_a_chunk(self) -> Self:
        if self.tokens.keep == "last":
            raise ValueError(
                "omni_opd supervises `tokens: all` or the `first` k: chunks are continued from their prefix"
            )
        if self.tokens.keep == "first":
            self.check_lengths(self.tokens.k)
        return self

    def check_lengths(self, shortest: int) -> None:
        if shortest < self.chunk_tokens:
            raise ConfigError(
                f"omni_opd audits chunks of {self.chunk_tokens} tokens, and completions of {shortest} have room for none; "
                "lower chunk_tokens, or let tokens, length_schedule or max_completion_length begin there"
            )

    @property
    def teacher_taps(self) -> Taps:
        return Taps()

    @property
    def reference_taps(self) -> Taps:
        return self.student_taps if self.anchor > 0 else Taps()

    def per_token(self, student: HiddenStates, targets: Targets) -> Float[Tensor, " N"]:
        """-score log p inside the audited chunks, the anchor's KL elsewhere, in nats."""
        assert student.batch.token_scores is not None
        scores = student.batch.ragged(student.batch.token_scores, self.tokens)
        audited, scores = ~scores.isnan(), scores.nan_to_num(0.0)
        weights = self._importance_weights(student, counted=audited)
        scores = scores if weights is None else weights * scores

        def loss(p: Tensor, initial: Tensor | None, ids: Tensor, scores: Tensor, audited: Tensor) -> Tensor:
            reinforced = -scores * token_logprobs(p, ids)
            if initial is None:
                return reinforced
            return torch.where(audited, reinforced, self.anchor * forward_kl(p, initial))

        ids = student.batch.sampled_ids(self.tokens)
        return self._of_logits(loss, student, ids, scores, audited, teacher=targets.reference)

    def annotate(self, rollouts: Rollouts, context: StepContext) -> Rollouts:
        """Audit, let the teacher continue, compare, and set `token_scores` to the targets less the baseline."""
        looked, tokenizer = self._look(rollouts, context), context.student.lm.tokenizer
        starts = [self._audit(entropies) for entropies, _ in looked]
        requests = self._requests(rollouts, starts, tokenizer)
        generations = context.ranks.together(lambda: context.teacher.generate(requests))
        chunks: list[Chunk] = []
        for row, (ids, (_, logprobs)) in enumerate(zip(rollouts.completion_ids, looked, strict=True)):
            for start, generation in zip(starts[row], generations[row], strict=True):
                if generation is not None:
                    span = slice(start, start + self.chunk_tokens)
                    similarities = tuple(edit_similarity(decode_written(tokenizer, ids[span]), generation.texts))
                    mean = float(logprobs[span].mean())
                    chunks.append(Chunk(row=row, start=start, similarities=similarities, mean_logprob=mean))
        targets = [chunk.target(self.prior) for chunk in chunks]
        written, tokens = [g for row in generations for g in row], sum(rollouts.lengths)
        similarities = [s for chunk in chunks for s in chunk.similarities]
        self._count("omni/audited/share", len(chunks) * self.chunk_tokens, tokens)
        self._count("omni/similarity/mean", sum(similarities), len(similarities))
        self._count("omni/target/mean", sum(targets), len(targets))
        self._count("omni/dropped_chunks/sum", sum(generation is None for generation in written))
        self._count("omni/entropy/mean", float(sum(entropies.sum() for entropies, _ in looked)), tokens)
        self._count("omni/teacher_tokens/mean", sum(g.tokens for g in written if g is not None), tokens)
        rows = [[float("nan")] * length for length in rollouts.lengths]
        for chunk, score in zip(chunks, self._less_baseline(rollouts, chunks, targets, context.ranks), strict=True):
            rows[chunk.row][chunk.start : chunk.start + self.chunk_tokens] = [score] * self.chunk_tokens
        return replace(rollouts, token_scores=tuple(map(tuple, rows)))

    def weights(self, rollouts: Rollouts) -> Float[Tensor, " N"]:
        """1 everywhere: a lost chunk has no score, and the anchor holds whatever the teacher says."""
        return torch.ones(sum(map(self.tokens.count, rollouts.lengths)))

    def total_weight(self, rollouts: Rollouts) -> float:
        """Completions: the sum over tokens is divided by them."""
        return float(len(rollouts))

    def _look(self, rollouts: Rollouts, context: StepContext) -> list[Float[Tensor, "2 T"]]:
        """The student's entropy and log-probability of every token by completion, in as many forward passes per rank."""
        spec = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
        groups, lm = rows_by_tokens(rollouts, context.micro_batch_tokens), context.student.lm
        found: dict[int, Tensor] = {}
        for rows, _ in context.ranks.in_step(groups):
            some = rollouts.take(rows)
            batch = student_batch(some, pad_id=lm.pad_id, device=lm.device)
            states = context.student.hidden(batch, Taps(hidden=(spec,), head=True))
            assert states.head is not None
            numbers = statistics(
                lambda p, _, ids: torch.stack([entropy(p), token_logprobs(p, ids)], -1),
                states.hidden[spec], states.head, batch.sampled_ids(ALL_TOKENS),
            )  # fmt: skip
            found |= zip(rows, numbers.T.contiguous().cpu().split(some.lengths, dim=1), strict=True)
        return [found[row] for row in range(len(rollouts))]

    def _audit(self, entropies: Float[Tensor, " T"]) -> tuple[int, ...]:
        _, length = self.tokens.span(len(entropies))
        order: list[int] = entropies[:length].argsort(descending=True, stable=True).tolist()
        return place_chunks(order, length, chunk_tokens=self.chunk_tokens, most=self.chunks)

    def _requests(
        self, rollouts: Rollouts, starts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[GenerationRequest]]:
        """One chain of nested prefixes per completion."""
        return [
            [
                GenerationRequest(
                    messages=prompt.teacher_messages, prefix=decode_written(tokenizer, ids[:start]), samples=self.continuations,
                    max_new_tokens=self.chunk_tokens, temperature=self.teacher_temperature, teacher=prompt.teacher,
                )
                for start in row
            ]
            for prompt, ids, row in zip(rollouts.prompts, rollouts.completion_ids, starts, strict=True)
        ]  # fmt: skip

    def _less_baseline(
        self, rollouts: Rollouts, chunks: Sequence[Chunk], targets: Sequence[float], ranks: Ranks
    ) -> Sequence[float]:
        if self.baseline == "none":
            return targets
        if self.baseline == "batch_mean":
            total, count = ranks.sum([sum(targets), float(len(targets))])
            return [target - total / max(1.0, count) for target in targets]
        prompts = [rollouts.prompts[chunk.row].row for chunk in chunks]
        return leave_one_out(targets, [chunk.row for chunk in chunks], prompts)


def place_chunks(order: Iterable[int], length: int, *, chunk_tokens: int, most: int) -> tuple[int, ...]:
    """Starts of at most `most` chunks in a completion of `length` tokens, increasing: greedily in the given order of
    anchors, each chunk whole and none overlapping another."""
    starts: list[int] = []
    for at in order:
        if len(starts) == most:
            break
        if at + chunk_tokens <= length and all(abs(at - start) >= chunk_tokens for start in starts):
            starts.append(at)
    return tuple(sorted(starts))


def leave_one_out(targets: Sequence[float], completions: Sequence[int], prompts: Sequence[int]) -> list[float]:
    """Each target less the mean over the chunks of its prompt's other completions; 0 where the prompt has no other."""
    scores = []
    for target, completion, prompt in zip(targets, completions, prompts, strict=True):
        others = [t for t, c, p in zip(targets, completions, prompts, strict=True) if p == prompt and c != completion]
        scores.append(target - sum(others) / len(others) if others else 0.0)
    return scores


def edit_similarity(text: str, others: Sequence[str]) -> list[float]:
    """1 - Levenshtein distance / longer length, over characters; 1 for two empty texts."""
    return [Levenshtein.normalized_similarity(text, other) for other in others]
