"""Whether a loaded model is what we take it for: what we tap off it and let it write, against its own forward passes."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from oprd.errors import ModelError
from oprd.losses.chunked import logits
from oprd.models.families import starts_with_block_1
from oprd.models.generate import bare_generation_config, left_padded
from oprd.models.language_model import LanguageModel, evaluating
from oprd.models.pretrained import shapes_only
from oprd.progress import console
from oprd.types import ALL_TOKENS, Batch, HiddenSpec, Taps

PROMPT_LENGTHS, NEW = (3, 8), 4
"""Tokens of two prompts, the shorter of which is padded, and tokens behind each."""
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of a token's mean absolute difference relative to its mean absolute entry; the median over tokens."""
EIGHT_BIT = 40.0
"""Times as much for LLM.int8, which rounds activations by the batch they are in: up to 0.10 in float32, 0.15 in bfloat16."""
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What transformers raises where a family cannot do a thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a run takes off a model; the rest is not looked at."""

    taps: Taps
    text: bool = True
    """Whether it writes."""


EVERYTHING = Use(taps=Taps(head=True))


@torch.no_grad()
def check_family(lm: LanguageModel, use: Use) -> None:
    """Raise ModelError naming the model type unless, on a few tokens: the states we tap from padded rows are the model's own
    of each row alone, also where only the first blocks run; our head gives its logits; and what it writes from padded
    prompts with its cache is what whole forward passes say."""
    if shapes_only():
        return
    core, name = lm.core, f"{lm.name} ({lm.core.config.model_type})"
    with evaluating(lm.model):
        try:
            rows, written = _write(lm) if use.text else (_rows(lm, NEW), [])
            own = [core(input_ids=row[None], use_cache=False, output_hidden_states=True) for row in rows]
            batch, specs = _batch(lm, rows), [_spec(block) for block in range(1, lm.num_blocks + 1)]
            tapped = lm.tap(batch, Taps(hidden=tuple(specs))).hidden
            deepest = _spec(max(map(lm.block_of, use.taps.hidden), default=lm.num_blocks))
            shallow = lm.tap(batch, Taps(hidden=(deepest,))).hidden[deepest]
        except FAILURES as error:
            raise ModelError(f"{name}: reading or writing a few tokens fails: {error}") from error
    first = 0 if starts_with_block_1(core.config) else 1
    within = _tolerance(core)
    for at, spec in enumerate(specs):
        theirs = [out.hidden_states[-1 if spec == specs[-1] else first + at][0] for out in own]
        _compare_rows(tapped[spec], theirs, f"{name}: the hidden states of block {spec.block}", within)
    what = f"{name}: the hidden states of block {deepest.block} without deeper blocks"
    _compare(shallow, tapped[deepest], what, within)
    if use.taps.head:
        ours = logits(tapped[specs[-1]], replace(lm.head(), stops=()))
        what = f"{name}: the logits, which objectives on hidden states with health_tokens=0 do not need,"
        _compare_rows(ours, [out.logits[0] for out in own], what, within)
    for ours, theirs, length in zip(written, own, PROMPT_LENGTHS, strict=False):
        what = f"{name}: the logits of its cached generation from padded prompts"
        _compare(ours, theirs.logits[0, length - 1 : -1], what, within)


@torch.no_grad()
def check_bf16(lm: LanguageModel, writer: LanguageModel, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
    """Raise ModelError unless a few tokens can be read under `autocast`, and written by the copy in bfloat16."""
    if shapes_only():
        return
    try:
        with evaluating(lm.model), autocast():
            lm.tap(_batch(lm, _rows(lm, NEW)), Taps(hidden=(_spec(lm.num_blocks),)))
        _write(writer)
    except FAILURES as error:
        raise ModelError(
            f"{lm.name} ({lm.core.config.model_type}): bf16 is true, but reading or writing a few tokens in bfloat16 fails: "
            f"{error}; set bf16: false"
        ) from error


def packing(lm: LanguageModel, wanted: bool) -> LanguageModel:
    """The model that packs rows if that is wanted and it can; a line to the user where it cannot."""
    able = wanted and (shapes_only() or packs(lm))
    if wanted and not able:
        console.print(f"{lm.name} cannot read several rows packed into one; its rows are padded.")
    return replace(lm, packs=able)


@torch.no_grad()
def packs(lm: LanguageModel) -> bool:
    """Whether a row behind another has the states that it has alone: not where a layer carries a state from token to token,
    nor where the family takes no positions."""
    batch, spec = _batch(lm, _rows(lm, NEW)), _spec(lm.num_blocks)
    with evaluating(lm.model):
        alone = replace(lm, packs=False).tap(batch, Taps(hidden=(spec,))).hidden[spec]
        try:
            packed = replace(lm, packs=True).tap(batch, Taps(hidden=(spec,))).hidden[spec]
        except TypeError:
            return False
    return _close(packed[NEW:], alone[NEW:], 0.2 * _tolerance(lm.core))  # GPT-1 mixes rows, weakly


def freeze_unreached(lm: LanguageModel, taps: Taps) -> None:
    """Take gradient from what the taps do not reach, which DDP would silently leave unsynchronised: blocks above the deepest,
    an untied LM head that takes no part, a vision tower. Reached is what autograd finds behind a few tokens, and experts that
    these tokens happened not to use."""
    with evaluating(lm.model), torch.enable_grad():
        states = lm.tap(_batch(lm, _rows(lm, NEW)), taps)
    head = () if states.head is None else (states.head.weight, states.head.bias)
    leaves = _leaves([x for x in (*states.hidden.values(), *head) if x is not None])
    trained = [(name, p) for name, p in lm.model.named_parameters() if p.requires_grad]
    kinds = {_kind(name) for name, p in trained if id(p) in leaves}
    for name, parameter in trained:
        parameter.requires_grad_(_kind(name) in kinds)


def _kind(name: str) -> str:
    """The name of a parameter, one for all experts of a layer."""
    return re.sub(r"experts\.\d+\.", "experts.", name)


def _leaves(tensors: Sequence[Tensor]) -> set[int]:
    """Ids of the leaves that autograd reaches from these tensors."""
    found, seen = {id(x) for x in tensors if x.is_leaf}, set[Any]()
    stack: list[Any] = [x.grad_fn for x in tensors if x.grad_fn is not None]
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            stack += [earlier for earlier, _ in node.next_functions if earlier is not None]
    return found


def _spec(block: int) -> HiddenSpec:
    return HiddenSpec(block=block, at="token", tokens=ALL_TOKENS)


def _rows(lm: LanguageModel, new: int) -> list[Tensor]:
    """Two prompts with `new` more tokens each."""
    vocabulary = lm.core.config.get_text_config().vocab_size
    return [torch.arange(10, 10 + n + new, device=lm.device) % vocabulary for n in PROMPT_LENGTHS]


def _batch(lm: LanguageModel, rows: Sequence[Tensor]) -> Batch:
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=lm.pad_id)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    lengths = tuple(len(row) - n for row, n in zip(rows, PROMPT_LENGTHS, strict=True))
    return Batch(input_ids=ids, attention_mask=mask, prompt_lengths=PROMPT_LENGTHS, completion_lengths=lengths)


def _write(lm: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    """The prompts with what is written behind them, greedily, and its logits, [NEW, V] each."""
    ids, mask = left_padded([row.tolist() for row in _rows(lm, 0)], lm.pad_id)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, pad_token_id=lm.pad_id, output_logits=True, return_dict_in_generate=True
    )
    with bare_generation_config(lm.core):
        out = cast(Any, lm.model).generate(
            input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=settings
        )
    rows = [row[ids.shape[1] - n :] for row, n in zip(out.sequences, PROMPT_LENGTHS, strict=True)]
    return rows, list(torch.stack(out.logits, 1))


def _tolerance(core: PreTrainedModel) -> float:
    """By the weights' precision: some families give float32 logits whatever they compute in."""
    share = EIGHT_BIT if getattr(core, "is_loaded_in_8bit", False) else 1.0
    return min(0.4, share * TOLERANCE.get(core.dtype, 5e-3))


def _compare_rows(ours: Tensor, theirs: Sequence[Tensor], what: str, within: float) -> None:
    """`ours`: at all completion tokens of the rows; `theirs`: at all tokens of each."""
    for part, row, length in zip(ours.split(NEW), theirs, PROMPT_LENGTHS, strict=True):
        _compare(part, row[length:], what, within)


def _compare(ours: Tensor, theirs: Tensor, what: str, within: float) -> None:
    if not _close(ours, theirs, within):
        raise ModelError(f"{what} are not those of its own forward pass; this family is not supported")


def _close(ours: Tensor, theirs: Tensor, within: float) -> bool:
    if ours.shape != theirs.shape or ours.dim() != 2:
        return False
    difference = (ours.float() - theirs.float()).abs().mean(-1) / theirs.float().abs().mean(-1)
    return float(difference.median()) <= within
