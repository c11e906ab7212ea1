"""What the loop asks of whatever generates text."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from oprd.types import PromptBatch, Rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    samples: int
    """Completions per prompt."""


class RolloutEngine(ABC):
    """Writes completions with the student's current weights."""

    @abstractmethod
    def generate(self, prompts: PromptBatch, sampling: Sampling, *, seed: int) -> Rollouts:
        """`sampling.samples` completions of every prompt, prompt by prompt.

        The result depends on weights, prompts, sampling and seed alone. A completion that meets the length limit before a
        stop token is marked unfinished; its text is as sampled, without an invented end.
        """
