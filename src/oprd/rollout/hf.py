"""Rollouts by transformers' `generate`, with the weights in training."""

from collections.abc import Sequence
from typing import Literal, final

from oprd.errors import ConfigError
from oprd.models.generate import Sampling, generate
from oprd.models.language_model import Model
from oprd.models.loading import ModelFacts
from oprd.rollout.base import EngineConfig, EngineContext, RolloutEngine
from oprd.seeds import derive_seed
from oprd.types import Prompt, Rollouts


class HFEngineConfig(EngineConfig):
    """transformers' generate, with the weights in training."""

    type: Literal["hf"] = "hf"

    def check(self, student: ModelFacts, context: EngineContext) -> None:
        if context.tokens > self.cache_tokens:
            raise ConfigError(
                f"rollout.engine.cache_tokens is {self.cache_tokens}, but the longest prompt and its longest completion take "
                f"{context.tokens} tokens; raise it, or lower max_completion_length"
            )

    def build(self, model: Model, context: EngineContext) -> RolloutEngine:
        return HFEngine(model, cache_tokens=self.cache_tokens)


@final
class HFEngine(RolloutEngine):
    """Prompts of similar length are left-padded and run together, as many as fit the cache."""

    def __init__(self, model: Model, *, cache_tokens: int = 131_072) -> None:
        self._model, self._writer, self._cache_tokens = model, model, cache_tokens

    def sync_weights(self) -> None:
        self._writer = self._model.writer()

    def at_once(self, tokens: int) -> int:
        return max(1, self._cache_tokens // tokens)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, places: range | None = None
    ) -> Rollouts:
        ids, samples = [prompt.token_ids for prompt in prompts], sampling.samples
        numbers = [samples * place + n for place in places or range(len(prompts)) for n in range(samples)]
        seeds = [derive_seed(seed, number) for number in numbers]
        completions = generate(self._writer, ids, sampling, seeds=seeds, cache_tokens=self._cache_tokens)
        stops = self._model.lm.stop_ids
        return Rollouts(
            prompts=tuple(prompt for prompt in prompts for _ in range(samples)),
            completion_ids=tuple(completions),
            finished=tuple(bool(ids) and ids[-1] in stops for ids in completions),
            max_new_tokens=sampling.max_new_tokens,
        )
