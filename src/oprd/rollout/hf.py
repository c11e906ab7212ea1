"""Rollouts by transformers' `generate`: no second copy of the weights, always in step with training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from oprd.models.generate import Sampling, generate
from oprd.models.language_model import Model
from oprd.rollout.base import RolloutEngine
from oprd.section import PositiveInt, Section
from oprd.types import Prompt, Rollouts


class HFEngineConfig(Section):
    """transformers' generate, with the weights in training."""

    type: Literal["hf"] = "hf"
    max_sequences: PositiveInt = 64
    """Sequences generated at once; bounds the key-value cache."""

    def build(self, model: Model, *, synced_gpus: bool = False) -> RolloutEngine:
        """The engine for this model."""
        return HFEngine(model, max_sequences=self.max_sequences, synced_gpus=synced_gpus)


@final
@dataclass(frozen=True, slots=True, eq=False)
class HFEngine(RolloutEngine):
    """Prompts of similar length are left-padded and run together, up to `max_sequences` at once."""

    model: Model
    max_sequences: int = 64
    synced_gpus: bool = False
    """All ranks run the same number of forward passes, as sharded weights need."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Rollouts:
        completions = generate(
            self.model, [prompt.token_ids for prompt in prompts], sampling,
            seed=seed, max_sequences=self.max_sequences, synced_gpus=self.synced_gpus,
        )  # fmt: skip
        stops = self.model.lm.stop_ids
        return Rollouts(
            prompts=tuple(prompt for prompt in prompts for _ in range(sampling.samples)),
            completion_ids=tuple(completions),
            finished=tuple(bool(ids) and ids[-1] in stops for ids in completions),
            max_new_tokens=sampling.max_new_tokens,
        )
