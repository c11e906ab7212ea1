"""Who writes the trajectory that the student learns on: the student, the dataset, the teacher, or a rewrite of the student's.

The rewrite is MPD, arXiv:2605.08776. Its prompt and filters are ours; none were published.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import PrivateAttr, field_validator
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import decode_written, encode, encode_written, fill, opened_reasoning, texts_to_judge
from oprd.distributed import Ranks
from oprd.errors import ConfigError, DataError
from oprd.models.generate import Sampling
from oprd.rollout.base import RolloutEngine
from oprd.section import Field, Section, Share
from oprd.seeds import derive_seed
from oprd.teacher.base import Generation, GenerationRequest, Teacher
from oprd.types import Capability, Message, Metric, Prompt, Rollouts
from oprd.verify.pool import Verdict, VerifierPool
from oprd.verify.reasoning import closing, final_part


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """What a source writes with."""

    engine: RolloutEngine
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    end_of_turn: int
    """Token that ends a turn of the student that was not written by it."""
    stop_ids: frozenset[int]
    """Every token that ends its turn."""
    max_new_tokens: int
    """Longest completion of the run."""
    seed: int
    ranks: Ranks
    verifier: VerifierPool


class Source(Section, ABC):
    """Who writes the trajectory. `rollouts` is called once per step; `bind` gives it what it writes with."""

    provides: ClassVar[frozenset[Capability]] = frozenset()
    writes_by_teacher: ClassVar[bool] = False
    """Asks the teacher for text."""
    writes_by_student: ClassVar[bool] = False
    """Starts with what the student writes, and may let it write a step ahead."""

    _context: SourceContext = PrivateAttr()
    _metrics: tuple[Metric, ...] = PrivateAttr(default=())

    def bind(self, context: SourceContext) -> Self:
        """The source that training uses."""
        bound = self.model_copy()
        bound._context, bound._metrics = context, ()
        return bound

    @abstractmethod
    def rollouts(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[Rollouts, Rollouts]:
        """(what was written first, what is learned on); one and the same but for a rewrite."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise DataError for a prompt that nothing can be written for. Called before anything is loaded."""

    def check_lengths(self, shortest: int, longest: int, *, only_teacher_text: bool) -> None:
        """Raise ConfigError if nothing can be learned on completions of `shortest` tokens, the least limit of the run."""

    def metrics(self) -> tuple[Metric, ...]:
        """What the last step's rollouts have to report."""
        return self._metrics

    def write_ahead(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> None:
        """Let the student begin to write for a later step with the weights of now."""
        self._context.engine.write_ahead(prompts, sampling, **self._draws(prompts, step))

    def _student_writes(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> Rollouts:
        with self._context.engine.session():
            return self._context.engine.generate(prompts, sampling, **self._draws(prompts, step))

    def _draws(self, prompts: Sequence[Prompt], step: int) -> dict[str, Any]:
        # 0 was the rank: one process writes what it always did
        seed = derive_seed(self._context.seed, "rollout", step, 0)
        return {"seed": seed, "places": self._context.ranks.places(prompts)}

    def _dataset_writes(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        """The dataset's completions, ended by the stop token unless they are too long."""
        most = sampling.max_new_tokens
        ids = [self._ended(encode(self._context.tokenizer, p.completion or "")) for p in prompts]
        return Rollouts(
            prompts=tuple(prompts), completion_ids=tuple(row[:most] for row in ids),
            finished=tuple(len(row) <= most for row in ids), written_by="dataset", max_new_tokens=most,
        )  # fmt: skip

    def _ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids up to the first token that ends the student's turn, or with one behind them."""
        stop = next((i for i, token in enumerate(ids) if token in self._context.stop_ids), len(ids))
        return (*ids[:stop], *(ids[stop : stop + 1] or (self._context.end_of_turn,)))

    def _require_completions(self, prompts: Sequence[Prompt], why: str) -> None:
        bare = next((prompt for prompt in prompts if not prompt.completion), None)
        if bare is not None:
            raise DataError(f"{why}, but row {bare.row} has no column 'completion'")


class StudentSource(Source):
    """The student writes: on-policy distillation."""

    type: Literal["student"] = "student"
    lambda_on_policy: Share = 1.0
    """Share of steps on the student's completions; the others are on the dataset's `completion` column (GKD)."""

    writes_by_student: ClassVar[bool] = True

    @property
    def provides(self) -> frozenset[Capability]:  # type: ignore[override]
        return frozenset({Capability.ON_POLICY} if self.lambda_on_policy == 1 else {Capability.TEACHER_TEXT})

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        if self.lambda_on_policy < 1:
            self._require_completions(prompts, f"rollout.source.lambda_on_policy is {self.lambda_on_policy}")

    def rollouts(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[Rollouts, Rollouts]:
        written = (
            self._student_writes(prompts, sampling, step)
            if self._on_policy(step)
            else self._dataset_writes(prompts, sampling)
        )
        return written, written

    def write_ahead(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> None:
        if self._on_policy(step):
            super().write_ahead(prompts, sampling, step)

    def _on_policy(self, step: int) -> bool:
        draw = torch.Generator().manual_seed(derive_seed(self._context.seed, "lambda", step))
        return float(torch.rand((), generator=draw)) < self.lambda_on_policy


class DatasetSource(Source):
    """The dataset's `completion` column: off-policy distillation, or fine-tuning with objective `nll`."""

    type: Literal["dataset"] = "dataset"

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.TEACHER_TEXT})

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        self._require_completions(prompts, "rollout.source is 'dataset'")

    def rollouts(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[Rollouts, Rollouts]:
        written = self._dataset_writes(prompts, sampling)
        return written, written


class _TeacherWrites(Source):
    """Sources that ask the teacher for text."""

    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """The teacher's; 0 is greedy."""

    provides: ClassVar[frozenset[Capability]] = frozenset({Capability.TEACHER_TEXT})
    writes_by_teacher: ClassVar[bool] = True

    def _ask(self, conversations: Sequence[tuple[Prompt, tuple[Message, ...]]], most: int) -> list[Generation | None]:
        """The teacher's answer to each conversation about a prompt, of at most `most` tokens."""
        temperature = self.sampling_temperature
        requests = [
            GenerationRequest(messages=turns, max_new_tokens=most, temperature=temperature, teacher=prompt.teacher)
            for prompt, turns in conversations
        ]
        return [row[0] for row in self._context.teacher.generate([[request] for request in requests])]


class TeacherSource(_TeacherWrites):
    """The teacher answers the prompts: sequence distillation, the off-policy baseline."""

    type: Literal["teacher"] = "teacher"

    def rollouts(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[Rollouts, Rollouts]:
        repeated = tuple(prompt for prompt in prompts for _ in range(sampling.samples))
        # in the student's tokens, no longer than the student itself might write
        most, end = min(self._context.max_new_tokens, sampling.max_new_tokens), self._context.end_of_turn
        ids: list[tuple[int, ...]] = []
        for answer in self._ask([(prompt, prompt.teacher_messages) for prompt in repeated], most):
            if answer is None or not _text(answer):
                ids.append(())
                continue
            ended = (end,) if answer.finished[0] else ()
            ids.append((*encode_written(self._context.tokenizer, answer.texts[0]), *ended)[:most])
        lengths = [len(row) for row in ids if row]
        self._metrics = (
            Metric(name="sequence/length/mean", sum=float(sum(lengths)), count=float(len(lengths))),
            Metric(name="sequence/lost/sum", sum=float(len(ids) - len(lengths))),
        )
        rollouts = Rollouts(
            prompts=repeated, completion_ids=tuple(ids), finished=tuple(bool(row) and row[-1] == end for row in ids),
            written_by="teacher", max_new_tokens=most,
        )  # fmt: skip
        return rollouts, rollouts


REASONS = ("no_answer", "wrong_answer", "no_reply", "empty", "unfinished", "longer", "other_answer")
"""Why a completion keeps its own text, in the order of the checks. For the first two the teacher is not asked: no rewrite can
end in the answer of a completion that has none. A rewrite of equal length is kept: once the student is brief, good
rewrites are no shorter, and a stricter filter lets only those through that left something out."""


class RewriteSource(_TeacherWrites):
    """MPD: the teacher rewrites each of the student's completions more briefly.

    A rewrite replaces the completion if it is finished, not longer and ends in the same final answer. What the teacher
    reasons before it is no part of it; reasoning that the student's prompt opens is closed in front of it.
    """

    type: Literal["rewrite"] = "rewrite"
    writes_by_student: ClassVar[bool] = True
    prompt: str = (
        "Problem:\n{prompt}\n\nA solution by a student:\n{completion}\n\nRewrite this solution concisely. Keep the student's "
        "approach and final answer, even if it is wrong, and keep the form in which the answer is given. Leave out "
        "repetitions, detours and checks. Write only the rewritten solution."
    )
    """The user message; `{prompt}`, `{completion}` and the dataset's columns are filled in. Ours: none was published."""
    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """The teacher's. Ours."""
    only_correct: bool = False
    """Rewrite only completions that end in the dataset's answer. A teacher that gives text only says nothing else about
    right and wrong: learning on rewritten mistakes, the student drifts further into its own."""

    @field_validator("prompt")
    @classmethod
    def _has_completion(cls, value: str) -> str:
        if "{completion}" not in value:
            raise ValueError("the rewrite prompt must contain {completion}, the text to rewrite")
        return value

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._messages(prompt, "")
            if self.only_correct and prompt.answer is None:
                raise DataError(
                    f"row {prompt.row} has no answer, which rollout.source.only_correct needs; add it, or drop only_correct"
                )

    def check_lengths(self, shortest: int, longest: int, *, only_teacher_text: bool) -> None:
        if only_teacher_text and shortest < longest:
            raise ConfigError(
                "a completion that length_schedule cuts before its answer is not rewritten, and objective 'nll' learns on "
                "rewrites alone; drop length_schedule, or add an objective that learns on the student's completion as well"
            )

    def rollouts(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[Rollouts, Rollouts]:
        written = self._student_writes(prompts, sampling, step)
        tokenizer, verify = self._context.tokenizer, self._context.verifier.verify
        texts = [decode_written(tokenizer, ids) for ids in written.completion_ids]
        own = verify(texts_to_judge(tokenizer, written), [prompt.answer or "" for prompt in written.prompts])
        reasons = [self._not_asked(*row) for row in zip(texts, written.finished, own, strict=True)]
        asked = [i for i, reason in enumerate(reasons) if reason is None]
        conversations = [(written.prompts[i], self._messages(written.prompts[i], texts[i])) for i in asked]
        answers = self._ask(conversations, self._context.max_new_tokens)
        rewrites = [final_part(_text(answer)).strip() for answer in answers]
        same = verify(rewrites, [own[i].extracted or "" for i in asked])
        ids, finished = list(written.completion_ids), list(written.finished)
        for i, answer, rewrite, verdict in zip(asked, answers, rewrites, same, strict=True):
            opened = opened_reasoning(tokenizer, written.prompts[i].token_ids)
            new = self._ended(encode_written(tokenizer, f"{closing(opened)}\n\n{rewrite}" if opened else rewrite))
            reasons[i] = _reason(answer, rewrite, longer=len(new) > len(ids[i]), same=verdict.correct)
            if reasons[i] is None:
                ids[i], finished[i] = new, True
        kept = tuple(reason is None for reason in reasons)
        learned = replace(
            written, completion_ids=tuple(ids), finished=tuple(finished), rewritten=kept, sampling_logprobs=None
        )
        self._metrics = _rewrite_metrics(written, learned, kept, Counter(reasons), own)
        return written, learned

    def _messages(self, prompt: Prompt, completion: str) -> tuple[Message, ...]:
        """The request to rewrite, behind the system message that the teacher has for this prompt."""
        columns = dict(prompt.columns) | {"prompt": prompt.messages[-1].content, "completion": completion}
        system = [turn for turn in prompt.teacher_messages if turn.role == "system" and turn not in prompt.messages]
        return (*system, Message(role="user", content=fill(self.prompt, columns, key="rollout.source.prompt")))

    def _not_asked(self, text: str, finished: bool, own: Verdict) -> str | None:
        """Why no rewrite of this completion could be used."""
        # the last number of a completion that was cut is no answer, unless it was boxed
        if own.extracted is None or not (finished or re.search(r"\\boxed\{[^}]*\}", text)):
            return "no_answer"
        return "wrong_answer" if self.only_correct and not own.correct else None


SourceConfig = Annotated[StudentSource | DatasetSource | TeacherSource | RewriteSource, Field(discriminator="type")]


def _text(answer: Generation | None) -> str:
    return answer.texts[0].strip() if answer is not None else ""


def _reason(answer: Generation | None, rewrite: str, *, longer: bool, same: bool) -> str | None:
    """The first of REASONS that holds; None for a rewrite that is learned on."""
    if answer is None:
        return "no_reply"
    if not rewrite:
        return "empty"
    if not answer.finished[0]:
        return "unfinished"
    if longer:
        return "longer"
    return None if same else "other_answer"


def _rewrite_metrics(
    written: Rollouts, learned: Rollouts, kept: Sequence[bool], counts: Counter[str | None], own: Sequence[Verdict]
) -> tuple[Metric, ...]:
    known = [verdict.correct for prompt, verdict in zip(written.prompts, own, strict=True) if prompt.answer]
    before, after = (float(sum(compress(rollouts.lengths, kept))) for rollouts in (written, learned))
    return (
        Metric(name="rollout/accuracy/share", sum=float(sum(known)), count=float(len(known))),
        Metric(name="rewrite/kept/share", sum=float(sum(kept)), count=float(len(kept))),
        Metric(name="rewrite/length/mean", sum=after, count=float(sum(kept))),
        Metric(name="rewrite/replaced_length/mean", sum=before, count=float(sum(kept))),
        *(Metric(name=f"rewrite/{reason}/sum", sum=float(counts[reason])) for reason in REASONS),
    )
