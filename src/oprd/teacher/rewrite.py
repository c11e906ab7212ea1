"""Teachers that give the student another trajectory to learn on: its own completion rewritten (MPD), or the teacher's.

MPD: arXiv 2605.08776 [second-hand]; the prompt and the filters are ours, none were published.
"""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, final

from transformers import PreTrainedTokenizerBase

from oprd.config.models import RewritingTeacherConfig, SequenceTeacherConfig
from oprd.data.chat import decode, encode, fill
from oprd.errors import DataError
from oprd.teacher.base import Teacher
from oprd.teacher.writer import Ask, Writer, Written
from oprd.types import (
    Lost,
    Message,
    NotRewritten,
    Prompt,
    Reading,
    Rollouts,
    Tally,
    TeacherTargets,
    TextTargets,
)

REASONS = ("no_answer", "wrong_answer", "no_reply", "empty", "unfinished", "longer", "other_answer")
"""Why there is no rewriting to learn on, in the order in which it is looked at. For the first two the teacher is not asked: no
rewriting can end in the answer of a completion that has none, as one that a length limit cut. One of equal length is kept:
once the student is brief, good rewritings are no shorter, and a filter that wants them shorter lets only those through that
left something out."""


class Judged(Protocol):
    """What is asked of a verdict."""

    @property
    def correct(self) -> bool: ...

    @property
    def extracted(self) -> str | None:
        """The final answer as it was found."""


class Judge(Protocol):
    """Compares final answers, and owns the processes it does so in."""

    def verify(self, completions: Sequence[str], answers: Sequence[str]) -> Sequence[Judged]: ...

    def close(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class WritingTeacher(Teacher):
    """A teacher whose text takes the place of the student's."""

    provides: ClassVar = frozenset({TextTargets})

    writer: Writer
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    stop: int
    """The token that ends the student's turn."""
    local: Teacher | None
    """Reads the writer's text, if that is white-box."""
    max_tokens: int
    _tallies: tuple[Tally, ...] = field(default=(), init=False)

    @abstractmethod
    def check_prompt(self, prompt: Prompt) -> None:
        """Raise DataError for a prompt that the writer cannot be asked about."""

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        prompts = tuple(prompts)
        for prompt in prompts:
            self.check_prompt(prompt)
        if self.local is not None:
            self.local.check_prompts(prompts)

    def tallies(self) -> tuple[Tally, ...]:
        return (*self._tallies, *self.writer.tallies())

    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> TeacherTargets:
        return TextTargets() if self.local is None else self.local.targets(rollouts, readings, head=head)

    def comparable(self, rollouts: Rollouts, readings: Iterable[Reading]) -> tuple[Reading, ...]:
        return () if self.local is None else self.local.comparable(rollouts, readings)


@final
@dataclass(eq=False, kw_only=True)
class RewritingTeacher(WritingTeacher):
    """The writer rewrites each completion more briefly.

    Where the result cannot be used the student's own completion stands: plain OPD if `local` can answer on it, and without
    weight in the likelihood of the teacher's text.
    """

    config: RewritingTeacherConfig
    judge: Judge

    def check_prompt(self, prompt: Prompt) -> None:
        self._question(prompt, "")
        if self.config.only_correct and prompt.answer is None:
            raise DataError(
                f"row {prompt.row} has no answer, which teacher.only_correct needs; add it, or drop only_correct"
            )

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        texts = [decode(self.tokenizer, ids) for ids in rollouts.completion_ids]
        own = self.judge.verify(texts, [prompt.answer or "" for prompt in rollouts.prompts])
        reasons = [self._not_asked(*row) for row in zip(texts, rollouts.finished, own, strict=True)]
        asked = [i for i, reason in enumerate(reasons) if reason is None]
        replies = self.writer.write([[self._question(rollouts.prompts[i], texts[i])] for i in asked])
        answers = dict(zip(asked, (row[0] for row in replies), strict=True))
        rewritten = [_text(answers.get(i)) for i in range(len(rollouts))]
        same = self.judge.verify([rewritten[i] for i in asked], [own[i].extracted or "" for i in asked])
        ids = [(*encode(self.tokenizer, text), self.stop) for text in rewritten]
        for i, agrees in zip(asked, same, strict=True):
            longer = len(ids[i]) > rollouts.lengths[i]
            reasons[i] = _reason(answers[i], rewritten[i], longer=longer, same=agrees.correct)
        self._report(rollouts, ids, reasons, own)
        return replace(
            rollouts,
            completion_ids=tuple(
                new if reason is None else old
                for new, old, reason in zip(ids, rollouts.completion_ids, reasons, strict=True)
            ),
            finished=tuple(done or reason is None for done, reason in zip(rollouts.finished, reasons, strict=True)),
            answers=tuple(None if reason is None else NotRewritten(reason=reason) for reason in reasons),
        )

    def close(self) -> None:
        self.judge.close()

    def _not_asked(self, text: str, finished: bool, own: Judged) -> str | None:
        """Why no rewriting of this completion could be used."""
        # the last number of a completion that was cut is no answer, unless it was boxed
        if own.extracted is None or not (finished or re.search(r"\\boxed\{[^}]*\}", text)):
            return "no_answer"
        return "wrong_answer" if self.config.only_correct and not own.correct else None

    def _question(self, prompt: Prompt, completion: str) -> Ask:
        columns = dict(prompt.columns) | {"prompt": prompt.messages[-1].content, "completion": completion}
        turns = [Message(role="user", content=fill(self.config.rewrite_prompt, columns, key="rewrite_prompt"))]
        if self.writer.system_prompt is not None:
            turns.insert(0, Message(role="system", content=self.writer.system_prompt))
        return Ask(messages=tuple(turns), max_tokens=self.max_tokens, temperature=self.config.sampling_temperature)

    def _report(
        self, rollouts: Rollouts, ids: Sequence[Sequence[int]], reasons: Sequence[str | None], own: Sequence[Judged]
    ) -> None:
        count = float(len(rollouts))
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        counts = Counter(reasons)
        known = [verdict.correct for prompt, verdict in zip(rollouts.prompts, own, strict=True) if prompt.answer]
        self._tallies = (
            Tally(name="rollout/accuracy/share", total=sum(known), of=float(len(known))),
            Tally(name="rewrite/kept/share", total=float(len(kept)), of=count),
            Tally(name="rewrite/length/mean", total=float(sum(len(ids[i]) for i in kept)), of=float(len(kept))),
            Tally(
                name="rewrite/replaced_length/mean",
                total=float(sum(rollouts.lengths[i] for i in kept)),
                of=float(len(kept)),
            ),
            *(Tally(name=f"rewrite/{reason}/sum", total=counts[reason]) for reason in REASONS),
        )


@final
@dataclass(eq=False, kw_only=True)
class SequenceTeacher(WritingTeacher):
    """The writer answers the prompts itself, and the student learns on that."""

    config: SequenceTeacherConfig

    def check_prompt(self, prompt: Prompt) -> None:
        self.writer.conversation(prompt)

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        room = min(self.max_tokens, rollouts.max_tokens or self.max_tokens)
        asks = [
            Ask(
                messages=self.writer.conversation(prompt),
                max_tokens=room,
                temperature=self.config.sampling_temperature,
            )
            for prompt in rollouts.prompts
        ]
        answers = [row[0] for row in self.writer.write([[ask] for ask in asks])]
        reasons = ["no_reply" if answer is None else None if answer.texts[0].strip() else "empty" for answer in answers]
        lost = [reason is not None for reason in reasons]
        ids = [() if gone else self._ids(answer, room) for answer, gone in zip(answers, lost, strict=True)]
        lengths = [len(row) for row, gone in zip(ids, lost, strict=True) if not gone]
        self._tallies = (
            Tally(name="sequence/length/mean", total=float(sum(lengths)), of=float(len(lengths))),
            Tally(name="sequence/lost/sum", total=sum(lost)),
        )
        return replace(
            rollouts,
            completion_ids=tuple(ids),
            finished=tuple(bool(row) and row[-1] == self.stop for row in ids),
            answers=tuple(Lost(reason=reason) if reason else None for reason in reasons) if any(lost) else None,
        )

    def _ids(self, answer: Written | None, room: int) -> tuple[int, ...]:
        """The teacher's text in the student's tokens, no longer than the student itself might write."""
        if answer is None:
            return ()
        ids = encode(self.tokenizer, answer.texts[0])
        return ((*ids, self.stop) if answer.finished[0] else ids)[:room]


def _text(answer: Written | None) -> str:
    return answer.texts[0].strip() if answer is not None else ""


def _reason(answer: Written | None, text: str, *, longer: bool, same: bool) -> str | None:
    """The first of REASONS that holds; None for a rewriting that is learned on."""
    checks = {
        "no_reply": answer is None,
        "empty": not text,
        "unfinished": answer is not None and not answer.finished[0],
        "longer": longer,
        "other_answer": not same,
    }
    return next((reason for reason, holds in checks.items() if holds), None)
