"""OmniOPD's side of the teacher: audit what the student was unsure of, let a teacher go on from there, compare.

arXiv 2606.01476, sections 3.2.3 and Eq. 6-7 [second-hand]. The loss is in `objectives/omni.py`.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.config.objectives import OmniOPDConfig
from oprd.data.chat import decode
from oprd.data.collate import collate_student, rows_by_tokens
from oprd.errors import ServerError
from oprd.kernels.chunked import head_divergence
from oprd.kernels.reference import entropy, forward_kl, token_logprobs
from oprd.models import LanguageModel
from oprd.teacher.base import Teacher
from oprd.teacher.similarity import Similarity
from oprd.teacher.writer import Ask, Writer, Written
from oprd.types import (
    ChunkScores,
    ChunkTargets,
    HiddenTargets,
    JointTargets,
    Prompt,
    Reading,
    Rollouts,
    States,
    Tally,
    TeacherTargets,
    TokenSelection,
)

ALL = TokenSelection(keep="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the audit sees of the student at its current weights, one entry per token of a completion."""

    entropy: Float[Tensor, " T"]
    """In nats, as are the following."""
    logprobs: Float[Tensor, " T"]
    """Of the sampled tokens."""
    anchor_kl: Float[Tensor, " T"]
    """KL(student at start || student); zeros without an anchor."""


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


def chunk_target(similarities: Sequence[float], mean_logprob: float, prior: float) -> float:
    """(k + alpha * pi_bar) / (N + alpha): the posterior mean of a Dirichlet-multinomial whose prior is the student.

    k = sum of similarities, pi_bar = exp(mean log-probability of the chunk's tokens), alpha = `prior`.
    """
    k, n = sum(similarities), len(similarities)
    return (k + prior * float(torch.tensor(mean_logprob).exp())) / (n + prior)


def subtract_baseline(
    targets: Sequence[Sequence[float]], groups: Sequence[int], kind: str, mean: float
) -> list[tuple[float, ...]]:
    """Targets of each completion's chunks less the baseline: `mean` is over the whole step, `groups` are the prompts.

    leave_one_out: the mean over the chunks of the prompt's other completions; 0 is left where there are none.
    """
    if kind == "none":
        return [tuple(row) for row in targets]
    if kind == "batch_mean":
        return [tuple(target - mean for target in row) for row in targets]
    scores = []
    for i, row in enumerate(targets):
        others = [t for j, other in enumerate(targets) if j != i and groups[j] == groups[i] for t in other]
        scores.append(tuple(t - sum(others) / len(others) if others else 0.0 for t in row))
    return scores


@final
class AuditTeacher(Teacher):
    """Wraps whoever writes: `writers` by the teacher's name in the prompts ("" for a single teacher).

    `under` shows its states for the health numbers, and with `answers_too` answers the other terms of a mixture. `start` reads the student as it was before training, None without an
    anchor. `read` reads the student at its current weights. `agree` adds numbers up over the processes, and `most` takes
    their maximum, which sharded weights need.
    """

    provides = frozenset({ChunkTargets})

    def __init__(
        self,
        config: OmniOPDConfig,
        writers: Mapping[str, Writer],
        similarity: Similarity,
        *,
        lm: LanguageModel,
        read: Callable[..., Any],
        start: Teacher | None,
        under: Teacher | None,
        answers_too: bool,
        micro_batch_tokens: int,
        agree: Callable[[Sequence[float]], list[float]],
        most: Callable[[int], int],
    ) -> None:
        self._config = config
        self._tokens = TokenSelection.of(config.tokens, config.k)
        self._writers = writers
        self._similarity = similarity
        self._lm = lm
        self._read = read
        self._start = start
        self._under = under
        self._answering = under if answers_too else None
        self._micro_batch_tokens = micro_batch_tokens
        self._agree = agree
        self._most = most
        self._tallies: tuple[Tally, ...] = ()

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        prompts = tuple(prompts)
        for prompt in prompts:
            self._writer(prompt).conversation(prompt)
        if self._under is not None:
            self._under.check_prompts(prompts)

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        seen = self._look(rollouts)
        starts = [self._audit(rollouts, i, seen[i]) for i in range(len(rollouts))]
        failure: ServerError | None = None
        written: list[list[Written | None]] = [[None] * len(row) for row in starts]
        try:
            if self._answering is not None:
                rollouts = self._answering.prepare(rollouts)
            written = self._ask(rollouts, starts)
        except ServerError as error:
            failure = error
        kept = [[at for at, answer in enumerate(row) if answer is not None] for row in written]
        alike = [
            [self._alike(rollouts, i, starts[i][at], cast(Written, written[i][at])) for at in row]
            for i, row in enumerate(kept)
        ]
        targets = [
            [
                chunk_target(
                    similarities, float(self._chunk(seen[i].logprobs, starts[i][at]).mean()), self._config.prior
                )
                for at, similarities in zip(kept[i], alike[i], strict=True)
            ]
            for i in range(len(rollouts))
        ]
        flat = [target for row in targets for target in row]
        total, count, failed = self._agree([sum(flat), float(len(flat)), float(failure is not None)])
        if failed:
            raise failure or ServerError("the teacher of another process stopped; its message says why")
        scores = subtract_baseline(
            targets, [p.row for p in rollouts.prompts], self._config.baseline, total / max(1.0, count)
        )
        self._report(rollouts, seen, starts, written, alike, flat)
        under = rollouts.answers or (None,) * len(rollouts)
        return replace(
            rollouts,
            answers=tuple(
                ChunkScores(
                    starts=tuple(starts[i][at] for at in kept[i]),
                    length=self._config.chunk_tokens,
                    scores=scores[i],
                    under=under[i],
                )
                for i in range(len(rollouts))
            ),
        )

    def tallies(self) -> tuple[Tally, ...]:
        writers = [
            replace(tally, name=tally.name.replace("teacher/", f"teacher_{name}/", 1) if name else tally.name)
            for name, writer in self._writers.items()
            for tally in writer.tallies()
        ]
        return (*self._tallies, *writers, *(self._answering.tallies() if self._answering is not None else ()))

    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> TeacherTargets:
        readings = tuple(readings)
        if rollouts.answers is None and self._under is not None:
            return self._under.targets(rollouts, readings, head=head)  # not prepared: health numbers
        device = self._lm.device
        audited = [torch.zeros(length, dtype=torch.bool) for length in rollouts.lengths]
        scores = [torch.zeros(length) for length in rollouts.lengths]
        for i, answer in enumerate(rollouts.answers or ()):
            assert isinstance(answer, ChunkScores), answer
            for start, score in zip(answer.starts, answer.scores, strict=True):
                audited[i][start : start + answer.length] = True
                scores[i][start : start + answer.length] = score
        start = None if self._start is None else self._start.targets(rollouts, readings, head=True)
        assert start is None or isinstance(start, HiddenTargets)
        chunks = ChunkTargets(audited=torch.cat(audited).to(device), scores=torch.cat(scores).to(device), start=start)
        if self._answering is None:
            return chunks
        below = replace(rollouts, answers=tuple(cast(ChunkScores, answer).under for answer in rollouts.answers or ()))
        return JointTargets(parts=(chunks, *_parts(self._answering.targets(below, readings, head=head))))

    def comparable(self, rollouts: Rollouts, readings: Iterable[Reading]) -> tuple[Reading, ...]:
        return () if self._under is None else self._under.comparable(rollouts, readings)

    def close(self) -> None:
        if self._under is not None:
            self._under.close()

    # Audit

    def _look(self, rollouts: Rollouts) -> list[Seen]:
        """The student's numbers on every completion, micro-batch by micro-batch, equally many on every process."""
        reading = Reading(block="last", at="prediction", tokens=ALL)
        groups = rows_by_tokens(rollouts, self._micro_batch_tokens)
        seen: dict[int, Seen] = {}
        for at in range(self._most(len(groups))):
            rows = groups[at] if at < len(groups) else groups[0]
            seen |= zip(rows, self._look_at(rollouts.take(rows), reading), strict=True)
        return [seen[i] for i in range(len(rollouts))]

    def _look_at(self, rollouts: Rollouts, reading: Reading) -> list[Seen]:
        batch = collate_student(rollouts, pad_id=self._lm.pad_id, device=self._lm.device)
        start = None if self._start is None else self._start.targets(rollouts, [reading], head=True)
        ids = batch.sampled_ids(ALL)

        def numbers(states: States) -> tuple[Tensor, ...]:
            hidden, head = states.hidden[reading], states.head
            assert head is not None
            unsure = head_divergence(hidden, head, None, None, ids, lambda s, _, __: entropy(s))
            logprobs = head_divergence(hidden, head, None, None, ids, lambda s, _, ids: token_logprobs(s, ids))
            if start is None:
                return unsure, logprobs, torch.zeros_like(unsure)
            assert isinstance(start, HiddenTargets)
            assert start.head is not None
            moved = head_divergence(
                hidden, head, start.hidden[reading], start.head, ids, lambda s, t, _: forward_kl(s, t)
            )
            return unsure, logprobs, moved

        with torch.no_grad(), _evaluating(self._lm):
            parts = [x.cpu().split(rollouts.lengths) for x in self._read(batch, [reading], True, numbers)]
        return [Seen(entropy=e, logprobs=p, anchor_kl=k) for e, p, k in zip(*parts, strict=True)]

    def _audit(self, rollouts: Rollouts, row: int, seen: Seen) -> tuple[int, ...]:
        _, length = self._tokens.span(rollouts.lengths[row])
        if self._config.audit == "entropy":
            order: list[int] = seen.entropy[:length].argsort(descending=True, stable=True).tolist()
        else:
            order = list(range(length))
            # a seed of its own per completion: nothing to save, the same on resume
            random.Random(repr((rollouts.prompts[row].row, rollouts.completion_ids[row]))).shuffle(order)
        return place_chunks(order, length, chunk_tokens=self._config.chunk_tokens, most=self._config.chunks)

    # Continuations

    def _ask(self, rollouts: Rollouts, starts: Sequence[Sequence[int]]) -> list[list[Written | None]]:
        """One chain of nested prefixes per completion, all chains of a teacher at once."""
        written: list[list[Written | None]] = [[] for _ in range(len(rollouts))]
        for name, writer in self._writers.items():
            rows = [i for i, prompt in enumerate(rollouts.prompts) if name in {"", prompt.teacher}]
            chains = [[self._question(rollouts, i, start, writer) for start in starts[i]] for i in rows]
            for i, answers in zip(rows, writer.write(chains), strict=True):
                written[i] = answers
        return written

    def _question(self, rollouts: Rollouts, row: int, start: int, writer: Writer) -> Ask:
        return Ask(
            messages=writer.conversation(rollouts.prompts[row]),
            prefix=decode(self._lm.tokenizer, rollouts.completion_ids[row][:start]),
            samples=self._config.continuations,
            max_tokens=self._config.chunk_tokens,
            temperature=self._config.teacher_temperature,
        )

    def _writer(self, prompt: Prompt) -> Writer:
        return self._writers.get("") or self._writers[str(prompt.teacher)]

    def _alike(self, rollouts: Rollouts, row: int, start: int, written: Written) -> list[float]:
        ids = rollouts.completion_ids[row][start : start + self._config.chunk_tokens]
        return self._similarity(decode(self._lm.tokenizer, ids), written.texts)

    def _chunk(self, values: Tensor, start: int) -> Tensor:
        return values[start : start + self._config.chunk_tokens]

    def _report(
        self,
        rollouts: Rollouts,
        seen: Sequence[Seen],
        starts: Sequence[Sequence[int]],
        written: Sequence[Sequence[Written | None]],
        alike: Sequence[Sequence[Sequence[float]]],
        targets: Sequence[float],
    ) -> None:
        tokens = float(sum(rollouts.lengths))
        answers = [answer for row in written for answer in row]
        similarities = [s for row in alike for chunk in row for s in chunk]
        self._tallies = (
            Tally(name="omni/audited/share", total=len(targets) * self._config.chunk_tokens, of=tokens),
            Tally(name="omni/similarity/mean", total=sum(similarities), of=float(len(similarities))),
            Tally(name="omni/target/mean", total=sum(targets), of=float(len(targets))),
            Tally(name="omni/dropped_chunks/sum", total=sum(answer is None for answer in answers)),
            Tally(name="omni/entropy/mean", total=float(sum(s.entropy.sum() for s in seen)), of=tokens),
            Tally(name="omni/anchor_kl/mean", total=float(sum(s.anchor_kl.sum() for s in seen)), of=tokens),
            Tally(name="omni/teacher_tokens/mean", total=sum(a.tokens for a in answers if a is not None), of=tokens),
        )


def _parts(targets: TeacherTargets) -> tuple[TeacherTargets, ...]:
    return targets.parts if isinstance(targets, JointTargets) else (targets,)


@contextlib.contextmanager
def _evaluating(lm: LanguageModel) -> Any:
    training = lm.model.training
    lm.model.eval()
    yield
    lm.model.train(training)
