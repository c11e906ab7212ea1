"""What the step asks of a teacher: targets on the student's completions, and text."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from oprd.data.chat import refuse_beyond, render_all, with_prompt
from oprd.errors import OverlongPrompt
from oprd.models.language_model import Model
from oprd.models.loading import ModelFacts
from oprd.section import OwnPrompt, Section
from oprd.types import Capability, HiddenSpec, Message, Metric, Prompt, Rollouts, Taps, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """The assistant's answer to `messages`, of which `prefix` is already written."""

    messages: tuple[Message, ...]
    prefix: str = ""
    samples: int = 1
    max_new_tokens: int
    """Of each sample, in the teacher's tokens."""
    temperature: float
    teacher: str | None = None
    """Which of several teachers is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a teacher wrote behind the prefix. Not finished: cut at `max_new_tokens`. `tokens`: its own, of all samples."""

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    tokens: int


Chains = Sequence[Sequence[GenerationRequest]]
"""Requests by chain: of equal `samples` and with nested prefixes, shortest first, so that a prefix cache serves them."""
Generations = list[list[Generation | None]]


class Teacher(ABC):
    """Answers on rollouts. Never gets gradient."""

    def annotate(self, rollouts: Rollouts) -> Rollouts:
        """Called once per step with all rollouts of this rank, before any targets: to align tokens or ask a server."""
        return rollouts

    @abstractmethod
    def targets(self, rollouts: Rollouts, taps: Taps) -> Targets:
        """What this teacher says about a micro-batch."""

    @abstractmethod
    def generate(self, chains: Chains) -> Generations:
        """An answer to every request, None where it was lost. Equal requests of one call are different draws; the same
        call again gives the same answers. Raises ServerError when nothing more can be had."""

    def comparable(self, rollouts: Rollouts, specs: Sequence[HiddenSpec]) -> tuple[HiddenSpec, ...]:
        """Those of the student's taps that mean the same in this teacher: diagnostics compare them."""
        return ()

    def metrics(self) -> tuple[Metric, ...]:
        """What the step's metrics say of this teacher, read once per step; the same names on every rank."""
        return ()

    def close(self) -> None:  # noqa: B027
        """Called once when training ends, however it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the recipe's objectives and source ask of teachers. `continues`: requests with a prefix. `top_k`: 0 or more."""

    taps: Taps
    text: bool
    continues: bool
    logprobs: bool
    top_k: int
    diagnostics: bool


@dataclass(frozen=True, kw_only=True)
class TeacherContext:
    """What a teacher is built from."""

    student: ModelFacts
    initial_student: Model
    """The student before training; usable once the student is loaded."""
    needs: Needs
    device: torch.device
    sharded: bool
    """The student's weights are sharded over ranks."""
    rank: int
    world_size: int
    seed: int
    cache_tokens: int
    packing: bool
    cache: Path
    """SQLite file of the run for a server's responses."""
    prompts: tuple[Prompt, ...] = ()
    pair_stops: tuple[int, ...] = ()
    """Stop ids of the student and its local teachers, where they differ."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Objects handed over from Python in place of names: `model`, `tokenizer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFacts:
    """What is known of a teacher before it is loaded."""

    provides: frozenset[Capability]
    why_not: Mapping[Capability, str]
    """Why it lacks a capability, for the error message."""
    model: ModelFacts | None
    """None for a server without a tokenizer, and for several teachers."""
    members: "Mapping[str, TeacherFacts]" = field(default_factory=dict)
    """Of several teachers, by name."""


class AnyTeacherConfig(Section, ABC):
    """One teacher or several, in a recipe. `type` tells the classes apart."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ on resume: none of them changes an answer."""
    uses_initial_student: ClassVar[bool] = False

    @property
    def members(self) -> "Mapping[str, AnyTeacherConfig]":
        """The teachers by name; a single one has the empty name."""
        return {"": self}

    @property
    def longest_wait_s(self) -> float:
        """For the answers of one teacher in a step, where they have a limit."""
        return 0.0

    def cache_bytes(self, tokens: int, logprobs: int) -> int:
        """Of the file in the run folder that keeps one teacher's answers on so many tokens, with so many numbers for each."""
        return 0

    @abstractmethod
    def facts(self, context: TeacherContext) -> TeacherFacts:
        """What can be known before anything is loaded or asked. Raises an OprdError for what is wrong already."""

    @abstractmethod
    def render(self, prompts: Sequence[Prompt], facts: TeacherFacts, room: int) -> list[Prompt]:
        """The prompts with the conversation that their teacher sees, which has to leave `room` tokens of its context for the
        completion. Raises DataError for one that no teacher can read."""

    @abstractmethod
    def build(self, facts: TeacherFacts, context: TeacherContext, name: str = "") -> Teacher:
        """The teacher, before the student is loaded. A server is asked a little; `name` is its key among several."""


class TeacherConfig(OwnPrompt, AnyTeacherConfig):
    """A single teacher, which may see another prompt than the student."""

    def render(self, prompts: Sequence[Prompt], facts: TeacherFacts, room: int) -> list[Prompt]:
        """The prompts with this teacher's conversations, in its own template and tokens."""
        seen = [with_prompt(p.messages, p.columns, self.system_prompt, self.prompt_template) for p in prompts]
        if (model := facts.model) is None:
            return [replace(prompt, teacher_messages=turns) for prompt, turns in zip(prompts, seen, strict=True)]
        ids = render_all(model.tokenizer, seen, self.chat_template_kwargs)
        for prompt, row in zip(prompts, ids, strict=True):
            refuse_beyond(model.tokenizer, row, model.vocabulary)
            if len(row) + room > model.context:
                given = (
                    f"the teacher's prompt has {len(row)} tokens, its context of {model.context} is to hold {room} more"
                )
                raise OverlongPrompt(f"row {prompt.row}: {given}; shorten or drop it, or lower max_completion_length")
        together = zip(prompts, seen, ids, strict=True)
        return [replace(p, teacher_messages=turns, teacher_token_ids=row) for p, turns, row in together]
