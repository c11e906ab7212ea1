"""Rollouts by transformers' `generate`: no second copy of the weights, always in step with training."""

import contextlib
from collections.abc import Callable
from typing import Any, cast, final

import torch
from transformers import GenerationConfig

from oprd.models import LanguageModel
from oprd.rollout.base import RolloutEngine, Sampling
from oprd.seeds import derive_seed
from oprd.types import PromptBatch, Rollouts


@final
class HFEngine(RolloutEngine):
    """Left-pads prompts of similar length and generates up to `max_sequences` at once.

    `generate` is the model's own, or the wrapper's around it (FSDP). `same_steps`: all processes run the same number of
    forward passes, as sharded weights need.
    """

    def __init__(
        self,
        lm: LanguageModel,
        stop_ids: tuple[int, ...],
        *,
        max_sequences: int,
        generate: Callable[..., Any] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        same_steps: bool = False,
    ) -> None:
        self._lm = lm
        self._stop_ids = stop_ids
        self._max_sequences = max_sequences
        self._generate = generate or cast(Callable[..., Any], lm.model.generate)
        self._autocast = autocast
        self.same_steps = same_steps

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, sampling: Sampling, *, seed: int) -> Rollouts:
        repeated = [prompt for prompt in prompts.prompts for _ in range(sampling.samples)]
        order = sorted(range(len(repeated)), key=lambda i: (len(repeated[i].token_ids), i))
        completions: list[tuple[int, ...]] = [()] * len(repeated)
        training, own_config = self._lm.model.training, self._lm.core.generation_config
        self._lm.model.eval()
        # generate fills what we leave open from the model's own config: a top_k or a repetition penalty found there would
        # change what "sampled from the student" means
        self._lm.core.generation_config = GenerationConfig()
        devices = [self._lm.device] if self._lm.device.type == "cuda" else []
        # transformers draws from the global generator; the caller's is left as it was
        with torch.random.fork_rng(devices=devices), self._autocast():
            for number, start in enumerate(range(0, len(order), self._max_sequences)):
                # how long one batch runs must not decide what the next one draws: other weights, the same random numbers
                torch.manual_seed(derive_seed(seed, number) if number else seed)
                rows = order[start : start + self._max_sequences]
                for i, ids in zip(rows, self._batch([repeated[i].token_ids for i in rows], sampling), strict=True):
                    completions[i] = ids
        self._lm.model.train(training)
        self._lm.core.generation_config = own_config
        finished = tuple(bool(ids) and ids[-1] in self._stop_ids for ids in completions)
        return Rollouts(
            prompts=tuple(repeated),
            completion_ids=tuple(completions),
            finished=finished,
            max_tokens=sampling.max_tokens,
        )

    def _batch(self, prompts: list[tuple[int, ...]], sampling: Sampling) -> list[tuple[int, ...]]:
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self._lm.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, ids in enumerate(prompts):
            input_ids[i, width - len(ids) :] = torch.tensor(ids)
            attention_mask[i, width - len(ids) :] = 1
        greedy = sampling.temperature == 0
        out = self._generate(
            input_ids=input_ids.to(self._lm.device),
            attention_mask=attention_mask.to(self._lm.device),
            synced_gpus=self.same_steps,
            generation_config=GenerationConfig(
                do_sample=not greedy,
                temperature=None if greedy else sampling.temperature,
                top_p=None if greedy else sampling.top_p,
                top_k=0 if not greedy else None,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=list(self._stop_ids),
                pad_token_id=self._lm.pad_id,
            ),
        )
        return [self._until_stop(row) for row in out[:, width:].tolist()]

    def _until_stop(self, row: list[int]) -> tuple[int, ...]:
        """The sampled tokens up to and with the first stop token; what generate pads behind it was not sampled."""
        for at, token in enumerate(row):
            if token in self._stop_ids:
                return tuple(row[: at + 1])
        return tuple(row)
