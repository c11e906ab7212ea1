"""Teachers that write: they answer a conversation, or go on with an answer that somebody else began."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from oprd.data.chat import decode, encode, render, with_prompt
from oprd.models import LanguageModel
from oprd.rollout.base import Sampling
from oprd.rollout.hf import HFEngine
from oprd.types import Message, Prompt, PromptBatch, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question: the assistant's answer to `messages`, which so far reads `prefix`."""

    messages: tuple[Message, ...]
    prefix: str = ""
    samples: int = 1
    max_tokens: int
    """Of each sample, in the teacher's tokens."""
    temperature: float
    """0 is greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a teacher wrote behind the prefix, `Ask.samples` times."""

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    """False: cut at `max_tokens`."""
    tokens: int
    """The teacher's, of all samples."""


class Writer(ABC):
    """A model that writes text."""

    system_prompt: str | None
    prompt_template: str | None

    @abstractmethod
    def write(self, chains: Sequence[Sequence[Ask]]) -> list[list[Written | None]]:
        """An answer to every question; None where it was lost.

        The questions of a chain have nested prefixes, shortest first, so that a server's prefix cache serves them. Equal
        questions of one call are different draws; the same call again gives the same answers.
        """

    @abstractmethod
    def tallies(self) -> tuple[Tally, ...]:
        """What `write` has to report, read once a step."""

    def conversation(self, prompt: Prompt) -> tuple[Message, ...]:
        """The prompt as this teacher reads it."""
        return with_prompt(prompt.messages, prompt.columns, self.system_prompt, self.prompt_template)


@final
class LocalWriter(Writer):
    """A model in this process, by transformers' generate. `without_adapter`: given when it is the student itself.

    A question that leaves no room for its answer in `context` tokens is not answered.
    """

    def __init__(
        self,
        lm: LanguageModel,
        engine: HFEngine,
        *,
        context: int,
        system_prompt: str | None = None,
        prompt_template: str | None = None,
        seed: int = 0,
        without_adapter: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.system_prompt = system_prompt
        self.prompt_template = prompt_template
        self._lm = lm
        self._engine = engine
        self._context = context
        self._seed = seed
        self._without_adapter = without_adapter

    def write(self, chains: Sequence[Sequence[Ask]]) -> list[list[Written | None]]:
        flat = [(ask, self._prompt_ids(ask)) for chain in chains for ask in chain]
        fits = [len(ids) + ask.max_tokens <= self._context for ask, ids in flat]
        written: dict[int, Written] = {}
        for sampling in dict.fromkeys(_sampling(ask) for ask, _ in flat):
            rows = [i for i, (ask, _) in enumerate(flat) if fits[i] and _sampling(ask) == sampling]
            written |= zip(rows, self._batch([flat[i] for i in rows], sampling), strict=True)
        answers = iter(written.get(i) for i in range(len(flat)))
        return [[next(answers) for _ in chain] for chain in chains]

    def tallies(self) -> tuple[Tally, ...]:
        return ()

    def _prompt_ids(self, ask: Ask) -> tuple[int, ...]:
        return (*render(self._lm.tokenizer, ask.messages), *encode(self._lm.tokenizer, ask.prefix))

    def _batch(self, asks: Sequence[tuple[Ask, tuple[int, ...]]], sampling: Sampling) -> list[Written]:
        prompts = PromptBatch(
            prompts=tuple(Prompt(row=i, messages=ask.messages, token_ids=ids) for i, (ask, ids) in enumerate(asks))
        )
        # the seed follows from the questions, so that a resumed run hears the same answers without any state
        digest = hashlib.blake2b(repr((self._seed, asks)).encode(), digest_size=7).digest()
        with self._without_adapter():
            rollouts = self._engine.generate(prompts, sampling, seed=int.from_bytes(digest, "big"))
        texts = [decode(self._lm.tokenizer, ids) for ids in rollouts.completion_ids]
        n = sampling.samples
        return [
            Written(
                texts=tuple(texts[i : i + n]),
                finished=rollouts.finished[i : i + n],
                tokens=sum(rollouts.lengths[i : i + n]),
            )
            for i in range(0, len(texts), n)
        ]


def _sampling(ask: Ask) -> Sampling:
    return Sampling(temperature=ask.temperature, top_p=1.0, max_tokens=ask.max_tokens, samples=ask.samples)
