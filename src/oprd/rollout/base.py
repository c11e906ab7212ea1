"""What writes completions."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from oprd.clock import Stopwatch
from oprd.distributed import Ranks
from oprd.models.generate import Sampling
from oprd.models.language_model import Model
from oprd.models.loading import ModelFacts
from oprd.section import PositiveInt, Section
from oprd.types import Prompt, Rollouts


class RolloutEngine(ABC):
    """Writes completions with the student's weights."""

    @cached_property
    def transfer(self) -> Stopwatch:
        """Of weights to where they write."""
        return Stopwatch()

    max_logprob_difference: float = math.inf
    """Largest mean difference, in nats, of its `sampling_logprobs` to the student's own."""

    @abstractmethod
    def sync_weights(self) -> None:
        """Write with the weights as they are now. Every rank calls it, before the first completions of a step."""

    @abstractmethod
    def at_once(self, tokens: int) -> int:
        """Completions that are written together where prompt and completion have at most this many tokens; at least 1."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, places: range | None = None
    ) -> Rollouts:
        """`sampling.samples` completions of every prompt, prompt by prompt. Called inside `session`.

        A completion depends on weights, prompt, sampling, seed and the prompt's place alone. `places` are those among the
        prompts of all ranks, None where there are no others: it is the same on any number of processes. One that meets the
        length limit before a stop token is marked unfinished; its text is as sampled, without an invented end.
        """

    def write_ahead(  # noqa: B027
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, places: range | None = None
    ) -> None:
        """Begin, with the weights of now, what `generate` will be asked for by these arguments in the next session."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around calls of `generate`, on every rank: weights as they are on entry, and memory for writing only inside."""
        with self.transfer.running():
            self.sync_weights()
        yield
        self.sleep()

    def sleep(self) -> None:  # noqa: B027
        """Give back memory until the next `sync_weights`."""

    def close(self) -> None:  # noqa: B027
        """End what the engine has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What engines are built from."""

    ranks: Ranks
    folder: Path
    """Of the engine's own files, inside the run folder. Made when first used."""
    bf16: bool
    """The student computes in bfloat16."""
    tokens: int
    """Of the longest prompt and the longest completion together."""


class EngineConfig(Section, ABC):
    """What generates the student's completions."""

    max_temperature: ClassVar[float] = math.inf
    runs_student: ClassVar[bool] = True
    """The student itself writes, not another model that is sent its weights."""

    @property
    def writes_ahead(self) -> bool:
        """Can write while the student learns."""
        return False

    cache_tokens: PositiveInt = 131_072
    """Tokens of the key-value cache: as many sequences are generated at once as fit it with their longest completions."""

    @property
    def longest_wait_s(self) -> float:
        """For a server to start and to answer, where they have a limit."""
        return 0.0

    @property
    def device_share(self) -> float:
        """Share of the student's device that it holds by itself while it writes."""
        return 0.0

    def check(self, student: ModelFacts, context: EngineContext) -> None:
        """Raise an OprdError for what cannot work, on every rank, before weights are loaded."""

    @abstractmethod
    def build(self, model: Model, context: EngineContext) -> RolloutEngine:
        """The engine for this model."""
