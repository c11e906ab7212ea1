"""What writes completions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from oprd.models.generate import Sampling
from oprd.types import Prompt, Rollouts


class RolloutEngine(ABC):
    """Writes completions with the student's weights."""

    @abstractmethod
    def sync_weights(self) -> None:
        """Write with the weights as they are now. Every rank calls it, before the first completions of a step."""

    @abstractmethod
    def at_once(self, tokens: int) -> int:
        """Completions that are written together where prompt and completion have at most this many tokens; at least 1."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Rollouts:
        """`sampling.samples` completions of every prompt, prompt by prompt.

        The result depends on weights, prompts, sampling and seed alone. A completion that meets the length limit before a
        stop token is marked unfinished; its text is as sampled, without an invented end.
        """
