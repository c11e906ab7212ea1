"""A frozen model in this process, read before its LM head."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from oprd.data.align import Aligner
from oprd.data.chat import render, with_prompt
from oprd.data.collate import collate
from oprd.errors import DataError
from oprd.models import LanguageModel, read_states
from oprd.progress import console
from oprd.teacher.base import Teacher
from oprd.types import HiddenTargets, MicroBatch, Prompt, Reading, Rollouts, States, Tally

Read = Callable[..., States]
"""`read_states` with its model filled in."""

FEW_PAIRED = 0.2
"""Share of paired positions below which the user is warned, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """What student and teacher have in common, as the checks before loading found it."""

    shape: bool
    """Blocks and width."""
    tokens: bool
    """Every id means the same to both."""


@final
class LocalTeacher(Teacher):
    """Runs the teacher's blocks on its own prompt and the student's completion.

    With `system_prompt` or `prompt_template` the teacher reads another prompt than the student, rendered with its own
    chat template. With another tokenizer it reads its own tokens of the completion, paired by `aligner`, or under
    `alignment: shared_ids` the student's ids as they are. `read` and `without_adapter` are given when the teacher is the
    student itself. `start` is the student as it was before training: it answers the readings at `written`, with its head
    where heads are asked for.
    """

    provides = frozenset({HiddenTargets})

    def __init__(
        self,
        lm: LanguageModel,
        *,
        context: int,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
        read: Read | None = None,
        without_adapter: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        likeness: Likeness = Likeness(shape=True, tokens=True),
        aligner: Aligner | None = None,
        start: "LocalTeacher | None" = None,
    ) -> None:
        self.lm = lm
        self._context = context
        self._system_prompt = system_prompt
        self._prompt_template = prompt_template
        self._read = read or (lambda batch, readings, head: read_states(lm, batch, readings, head=head))
        self._without_adapter = without_adapter
        self._likeness = likeness
        self._aligner = aligner
        self._start = start
        self._paired, self._of = 0, 0
        self._warned = False

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise DataError for a prompt that fills the teacher's context, or lacks a column the template needs."""
        for prompt in prompts:
            length = len(self._prompt_ids(prompt))
            if length >= self._context:
                raise DataError(
                    f"row {prompt.row}: the teacher's prompt has {length} tokens, its context is {self._context}; "
                    "shorten or drop it"
                )

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        if self._aligner is None:
            return rollouts
        answers = tuple(
            self._aligner.pair(ids, finished=finished)
            for ids, finished in zip(rollouts.completion_ids, rollouts.finished, strict=True)
        )
        self._paired, self._of = sum(len(answer.student) for answer in answers), sum(rollouts.lengths)
        if self._paired < FEW_PAIRED * self._of and not self._warned:
            self._warned = True
            console.print(
                f"[yellow]Only {self._paired / self._of:.0%} of the tokens end where one of teacher {self.lm.name} ends; "
                "the others are not supervised. A teacher with a closer tokenizer would say more.[/]"
            )
        return replace(rollouts, answers=answers)

    def tallies(self) -> tuple[Tally, ...]:
        if self._aligner is None:
            return ()
        return (Tally(name="teacher/paired/share", total=float(self._paired), of=float(self._of)),)

    def comparable(self, rollouts: Rollouts, readings: Iterable[Reading]) -> tuple[Reading, ...]:
        if not self._likeness.tokens:
            return ()
        return tuple(reading for reading in readings if self._likeness.shape or reading.block == "last")

    @torch.no_grad()
    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> HiddenTargets:
        batch = self._collate(rollouts)
        own = tuple(reading for reading in readings if reading.at != "written" or self._start is None)
        before = tuple(reading for reading in readings if reading not in own)
        training = self.lm.model.training
        self.lm.model.eval()
        with self._without_adapter():
            states = self._read(batch, own, head=head)
        self.lm.model.train(training)
        targets = HiddenTargets(hidden=states.hidden, head=states.head, batch=batch)
        if self._start is None or not before:
            return targets
        start = self._start.targets(replace(rollouts, answers=None), before, head=head)
        return replace(targets, hidden={**states.hidden, **start.hidden}, start_head=start.head)

    def _collate(self, rollouts: Rollouts) -> MicroBatch:
        pairings = rollouts.pairings
        return collate(
            [self._prompt_ids(prompt) for prompt in rollouts.prompts],
            rollouts.completion_ids if pairings is None else [pairing.teacher_ids for pairing in pairings],
            pad_id=self.lm.pad_id,
            device=self.lm.device,
            places=None
            if pairings is None
            else [pairing.of_teacher(length) for pairing, length in zip(pairings, rollouts.lengths, strict=True)],
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if self._aligner is None and not self._likeness.tokens:
            return prompt.token_ids
        turns = with_prompt(prompt.messages, prompt.columns, self._system_prompt, self._prompt_template)
        return render(self.lm.tokenizer, turns)
