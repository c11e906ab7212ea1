"""Text by transformers' `generate`, in left-padded batches: what the student's engine and local teachers share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from oprd.models.language_model import Model
from oprd.section import Field, PositiveInt, Section
from oprd.seeds import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int
    samples: int = 1
    """Completions per prompt."""


class SamplingSection(Section):
    """How a model writes, in a recipe."""

    sampling_temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that hold this share of the probability; 1: all."""
    max_completion_length: PositiveInt = 1024
    """In tokens. The paper: 16,384."""

    def sampling(self, *, samples: int, max_new_tokens: int | None = None) -> Sampling:
        """`samples` completions per prompt, of max_completion_length unless another limit is given."""
        return Sampling(
            temperature=self.sampling_temperature,
            top_p=self.top_p,
            max_new_tokens=max_new_tokens or self.max_completion_length,
            samples=samples,
        )


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    *,
    seed: int,
    max_sequences: int,
    synced_gpus: bool = False,
) -> list[tuple[int, ...]]:
    """`sampling.samples` completions of every prompt, prompt by prompt, each up to and with its first stop token.

    Prompts of similar length run together, at most `max_sequences` at once. The result depends on weights, prompts,
    sampling and seed alone. `synced_gpus`: all ranks run the same number of forward passes, as sharded weights need.
    """
    repeated = [ids for ids in prompts for _ in range(sampling.samples)]
    order = sorted(range(len(repeated)), key=lambda i: (len(repeated[i]), i))
    completions: list[tuple[int, ...]] = [()] * len(repeated)
    stop_ids = model.lm.stop_ids  # read from the config that is set aside below
    devices = [model.lm.device] if model.lm.device.type == "cuda" else []
    # transformers draws from the global generator; the caller's is left as it was
    with bare_generation_config(model.lm.core), torch.random.fork_rng(devices=devices):
        for number, start in enumerate(range(0, len(order), max_sequences)):
            # how long one batch runs must not decide what the next one draws: other weights, the same random numbers
            torch.manual_seed(derive_seed(seed, number) if number else seed)
            rows = order[start : start + max_sequences]
            done = _batch(model, [repeated[i] for i in rows], sampling, stop_ids, synced_gpus)
            for i, ids in zip(rows, done, strict=True):
                completions[i] = ids
    return completions


@contextmanager
def bare_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation config: a top_k or a repetition penalty found there, from which `generate` fills
    what we leave open, would change what "sampled from the student" means."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, [B, T]."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in prompts]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])


def _batch(
    model: Model, prompts: list[tuple[int, ...]], sampling: Sampling, stop_ids: tuple[int, ...], synced_gpus: bool
) -> list[tuple[int, ...]]:
    lm = model.lm
    input_ids, attention_mask = left_padded(prompts, lm.pad_id)
    greedy = sampling.temperature == 0
    out = model.generate(
        input_ids=input_ids.to(lm.device),
        attention_mask=attention_mask.to(lm.device),
        synced_gpus=synced_gpus,
        generation_config=GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=lm.pad_id,
            suppress_tokens=list(lm.unsampled_ids) or None,
        ),
    )
    return [_until_stop(row, stop_ids) for row in out[:, input_ids.shape[1] :].tolist()]


def _until_stop(row: list[int], stop_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The sampled tokens up to and with the first stop token; what generate pads behind it was not sampled."""
    end = next((at for at, token in enumerate(row) if token in stop_ids), len(row))
    return tuple(row[: end + 1])
