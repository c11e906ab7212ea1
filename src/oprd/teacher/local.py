"""A frozen model in this process, read before its LM head."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, final

import torch

from oprd.data.chat import render, with_prompt
from oprd.data.collate import collate
from oprd.errors import DataError
from oprd.models import LanguageModel, read_states
from oprd.teacher.base import Teacher
from oprd.types import HiddenTargets, MicroBatch, Prompt, Reading, Rollouts, States

Read = Callable[..., States]
"""`read_states` with its model filled in."""


@final
class LocalTeacher(Teacher):
    """Runs the teacher's blocks on its own prompt and the student's completion.

    With `system_prompt` or `prompt_template` the teacher reads another prompt than the student, rendered with its own
    chat template. `read` and `without_adapter` are given when the teacher is the student itself.
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
    ) -> None:
        self._lm = lm
        self._context = context
        self._system_prompt = system_prompt
        self._prompt_template = prompt_template
        self._read = read or (lambda batch, readings, head: read_states(lm, batch, readings, head=head))
        self._without_adapter = without_adapter

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise DataError for a prompt that fills the teacher's context, or lacks a column the template needs."""
        for prompt in prompts:
            length = len(self._prompt_ids(prompt))
            if length >= self._context:
                raise DataError(
                    f"row {prompt.row}: the teacher's prompt has {length} tokens, its context is {self._context}; "
                    "shorten or drop it"
                )

    @torch.no_grad()
    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> HiddenTargets:
        batch = self._collate(rollouts)
        training = self._lm.model.training
        self._lm.model.eval()
        with self._without_adapter():
            states = self._read(batch, tuple(readings), head=head)
        self._lm.model.train(training)
        return HiddenTargets(hidden=states.hidden, head=states.head)

    def _collate(self, rollouts: Rollouts) -> MicroBatch:
        return collate(
            [self._prompt_ids(prompt) for prompt in rollouts.prompts],
            rollouts.completion_ids,
            pad_id=self._lm.pad_id,
            device=self._lm.device,
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        turns = with_prompt(prompt.messages, prompt.columns, self._system_prompt, self._prompt_template)
        return render(self._lm.tokenizer, turns)
