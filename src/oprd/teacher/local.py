"""A frozen model in this process, read before its LM head."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from oprd.data.align import Aligner
from oprd.data.chat import render, with_prompt
from oprd.data.collate import collate, rows_by_tokens
from oprd.errors import DataError
from oprd.kernels.chunked import confidence, sampled_logprobs
from oprd.models import LanguageModel, read_states
from oprd.progress import console
from oprd.teacher.base import Teacher
from oprd.types import HiddenTargets, MicroBatch, Pairing, Prompt, Reading, Rollouts, States, Tally, TokenSelection

Read = Callable[..., States]
"""`read_states` with its model filled in."""


PASS_TOKENS = 16_384
"""Positions of one forward pass of `sampled`."""
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
    student itself. `start` is the student as it was before training: it answers the readings at `written`, with its head and
    how sure the teacher is beside them if they are to `sharpen` targets; and a pair whose next token it gave less than the
    probability `trust` is dropped.
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
        trust: float = 0.0,
        sharpen: bool = False,
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
        self._trust = trust
        self._sharpen = sharpen
        self._paired, self._of, self._trusted = 0, 0, 0
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
        if self._start is not None and self._trust > 0:
            logprobs = self._start.sampled(rollouts)
            answers = tuple(
                _only_trusted(pairing, row, math.log(self._trust))
                for pairing, row in zip(answers, logprobs, strict=True)
            )
        self._trusted = sum(len(answer.student) for answer in answers)
        return replace(rollouts, answers=answers)

    def tallies(self) -> tuple[Tally, ...]:
        if self._aligner is None:
            return ()
        paired = Tally(name="teacher/paired/share", total=float(self._paired), of=float(self._of))
        if self._start is None or self._trust == 0:
            return (paired,)
        return (paired, Tally(name="teacher/trusted/share", total=float(self._trusted), of=float(self._paired)))

    def comparable(self, rollouts: Rollouts, readings: Iterable[Reading]) -> tuple[Reading, ...]:
        if not self._likeness.tokens:
            return ()
        return tuple(reading for reading in readings if self._likeness.shape or reading.block == "last")

    @torch.no_grad()
    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> HiddenTargets:
        batch = self._collate(rollouts)
        own = tuple(reading for reading in readings if reading.at != "written" or self._start is None)
        before = tuple(reading for reading in readings if reading not in own)
        sharpen = self._sharpen and len(before) > 0
        training = self.lm.model.training
        self.lm.model.eval()
        with self._without_adapter():
            states = self._read(batch, own, head=head or sharpen)
        self.lm.model.train(training)
        targets = HiddenTargets(hidden=states.hidden, head=states.head, batch=batch)
        if self._start is None or not before:
            return targets
        start = self._start.targets(replace(rollouts, answers=None), before, head=sharpen)
        targets = replace(targets, hidden={**states.hidden, **start.hidden}, start_head=start.head)
        if not sharpen:
            return targets
        assert states.head is not None
        last = [reading for reading in own if reading.block in {"last", self.lm.num_blocks}]
        return replace(targets, sure={reading: confidence(states.hidden[reading], states.head) for reading in last})

    @torch.no_grad()
    def sampled(self, rollouts: Rollouts) -> list[list[float]]:
        """Log-probability of each sampled token of each completion, in nats, by this model, which has the student's tokens."""
        reading = Reading(block="last", at="prediction", tokens=TokenSelection(keep="all"))
        found: list[list[float]] = [[] for _ in rollouts.completion_ids]
        for rows in rows_by_tokens(rollouts, PASS_TOKENS):
            micro = replace(rollouts.take(rows), answers=None)
            targets = self.targets(micro, [reading], head=True)
            assert targets.head is not None
            assert targets.batch is not None
            ids = targets.batch.sampled_ids(reading.tokens)
            logprobs = sampled_logprobs(targets.hidden[reading], targets.head, ids).split(micro.lengths)
            for row, values in zip(rows, logprobs, strict=True):
                found[row] = values.tolist()
        return found

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


def _only_trusted(pairing: Pairing, logprobs: Sequence[float], least: float) -> Pairing:
    """Without the pairs whose next token had a log-probability below `least`. The last token has no next one."""
    kept = [i for i, at in enumerate(pairing.student) if at + 1 >= len(logprobs) or logprobs[at + 1] >= least]
    return replace(
        pairing,
        student=tuple(pairing.student[i] for i in kept),
        teacher=tuple(pairing.teacher[i] for i in kept),
    )
