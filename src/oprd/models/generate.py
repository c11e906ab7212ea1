"""Text by transformers' `generate`, in left-padded batches: what the student's engine and local teachers share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import StoppingCriteria

from oprd.models.families import continues_from_cache
from oprd.models.language_model import LanguageModel, Model
from oprd.section import Field, PositiveInt, Section


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
    model: Model, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, seeds: Sequence[int], cache_tokens: int
) -> list[tuple[int, ...]]:
    """`sampling.samples` completions of every prompt, prompt by prompt, each up to and with its first stop token.

    A completion depends on weights, prompt, sampling and its own one of `seeds` alone, not on what is written beside it.
    Prompts of similar length run together, as many as fit `cache_tokens` tokens of key-value cache.
    """
    repeated = [ids for ids in prompts for _ in range(sampling.samples)]
    completions: list[tuple[int, ...]] = [()] * len(repeated)
    stop_ids = model.lm.stop_ids  # read from the config that is set aside below
    with bare_generation_config(model.lm.core):
        for rows in _groups([len(ids) + sampling.max_new_tokens for ids in repeated], cache_tokens):
            draws = [torch.Generator(model.lm.device).manual_seed(seeds[row]) for row in rows]
            done = _together(model, [repeated[row] for row in rows], draws, sampling, stop_ids)
            for row, ids in zip(rows, done, strict=True):
                completions[row] = ids
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


def _groups(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows of similar size, in groups that fill at most `budget`, a row that is larger alone."""
    group: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda row: (sizes[row], row)):
        if group and (len(group) + 1) * sizes[row] > budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _together(
    model: Model,
    prompts: list[tuple[int, ...]],
    draws: list[torch.Generator],
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """One completion of each prompt. Rows that have ended leave the batch whenever only half of it still writes."""
    lm = model.lm
    ids, mask = (tensor.to(lm.device) for tensor in left_padded(prompts, lm.pad_id))
    width = ids.shape[1]
    limit = width + sampling.max_new_tokens
    continues = continues_from_cache(lm.core)
    cache = _prefill(model, prompts, ids, mask) if continues else None
    completions: list[tuple[int, ...]] = [()] * len(prompts)
    rows = list(range(len(prompts)))
    while rows:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=_processors(sampling, [draws[row] for row in rows]),
            stopping_criteria=[_HalfHaveEnded(stop_ids)],
            generation_config=_config(limit - ids.shape[1], lm, stop_ids),
        )
        written = [_until_stop(row, stop_ids) for row in out.sequences[:, width:].tolist()]
        ended = [ids[-1] in stop_ids or len(ids) == sampling.max_new_tokens for ids in written]
        for row, tokens in zip(rows, written, strict=True):
            completions[row] = tokens
        kept = [at for at, end in enumerate(ended) if not end]
        rows = [rows[at] for at in kept]
        index = torch.tensor(kept, dtype=torch.long, device=lm.device)
        cache = _select(out.past_key_values, index, out.sequences.shape[1] - 1) if continues else None
        mask = torch.cat([mask, mask.new_ones(len(mask), out.sequences.shape[1] - mask.shape[1])], dim=1)[index]
        ids = out.sequences[index]
    return completions


def _prefill(model: Model, prompts: list[tuple[int, ...]], ids: Tensor, mask: Tensor) -> Cache | None:
    """Keys and values of all but the prompts' last tokens, computed once for the samples of a prompt; None where there is
    nothing to share."""
    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
    if len(first) == len(prompts) or min(map(len, prompts)) == 1:
        return None
    rows = sorted(first.values())
    out = model.generate(
        input_ids=ids[rows, :-1], attention_mask=mask[rows, :-1], generation_config=_config(1, model.lm, ())
    )
    own = torch.tensor([rows.index(first[prompt]) for prompt in prompts], device=ids.device)
    return _select(out.past_key_values, own, ids.shape[1] - 1)


def _select(cache: Any, rows: Tensor, length: int) -> Cache | None:
    """The cache of these rows; None, and everything is read again, where a family's cache does not tell its `length`."""
    layers = cache.layers if isinstance(cache, Cache) else []
    attention = next((layer for layer in layers if isinstance(layer, CacheLayerMixin)), None)
    if attention is None or attention.get_seq_length() != length:
        return None
    cache.reorder_cache(cast(Any, rows))
    return cache


def _config(max_new_tokens: int, lm: LanguageModel, stop_ids: tuple[int, ...]) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=lm.pad_id,
        suppress_tokens=list(lm.unsampled_ids) or None,
        return_dict_in_generate=True,
    )


def _processors(sampling: Sampling, draws: Sequence[torch.Generator]) -> list[LogitsProcessor]:
    """What stands between the logits and the greedy choice."""
    if sampling.temperature == 0:
        return []
    top_p = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [TemperatureLogitsWarper(sampling.temperature), *top_p, _Draw(draws)]


class _Draw(LogitsProcessor):
    """Leaves one token to choose, drawn from the softmax by an exponential race: p / e is largest for token i with
    probability p_i. Each row has its own random numbers."""

    def __init__(self, draws: Sequence[torch.Generator]) -> None:
        self._draws = draws

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = torch.empty_like(scores)
        for row, draw in zip(noise, self._draws, strict=True):
            row.exponential_(generator=draw)
        chosen = (scores.softmax(-1) / noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _HalfHaveEnded(StoppingCriteria):
    """Ends a batch once half of its rows have ended."""

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self._stop_ids = stop_ids
        self._ended: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ends = torch.isin(input_ids[:, -1], torch.tensor(self._stop_ids, device=input_ids.device))
        self._ended = ends if self._ended is None else self._ended | ends
        return torch.full_like(ends, bool(2 * self._ended.sum() >= len(ends)))


def _until_stop(row: list[int], stop_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The sampled tokens up to and with the first stop token; what generate pads behind it was not sampled."""
    end = next((at for at, token in enumerate(row) if token in stop_ids), len(row))
    return tuple(row[: end + 1])
