"""From ragged rollouts to right-padded tensors, and into micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from oprd.types import PER_COMPLETION, Batch, Rollouts

MICRO_BATCH_COST = 64
"""What a micro-batch costs beside its padded positions, in positions: measured as 25 to 60 on SmolLM2-135M."""


def collate(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
    **annotations: Any,
) -> Batch:
    """Prompt and completion of each row behind each other, padded on the right to the longest. `annotations` are Batch's
    other fields."""
    together = zip(prompt_ids, completion_ids, strict=True)
    rows = [torch.tensor([*prompt, *completion], dtype=torch.long) for prompt, completion in together]
    ones = [torch.ones_like(row) for row in rows]
    return Batch(
        input_ids=pad_sequence(rows, batch_first=True, padding_value=pad_id).to(device),
        attention_mask=pad_sequence(ones, batch_first=True).to(device),
        prompt_lengths=tuple(map(len, prompt_ids)),
        completion_lengths=tuple(map(len, completion_ids)),
        **annotations,
    )


def student_batch(rollouts: Rollouts, *, pad_id: int, device: torch.device) -> Batch:
    """The rollouts behind the student's prompts, in the student's tokens."""
    return collate(
        [prompt.token_ids for prompt in rollouts.prompts], rollouts.completion_ids, pad_id=pad_id, device=device,
        alignments=rollouts.alignments, token_scores=rollouts.token_scores,
        sampling_logprobs=rollouts.sampling_logprobs,
    )  # fmt: skip


def teacher_batch(rollouts: Rollouts, *, pad_id: int, device: torch.device) -> Batch:
    """The rollouts behind the teacher's prompts, in the teacher's tokens where its tokenizer is another."""
    prompt_ids, alignments = [prompt.teacher_token_ids for prompt in rollouts.prompts], rollouts.alignments
    ids = rollouts.completion_ids if alignments is None else [alignment.teacher_ids for alignment in alignments]
    return collate(prompt_ids, ids, pad_id=pad_id, device=device, alignments=alignments, reads="teacher")


def split_by_tokens(rollouts: Rollouts, budget: int, *, packed: bool = False) -> list[Rollouts]:
    """Micro-batches of at most `budget` positions, of one teacher each, with the least padding; none where rows are packed.

    A completion longer than the budget is a micro-batch of its own.
    """
    return [rollouts.take(rows) for rows in rows_by_tokens(rollouts, budget, packed=packed)]


def rows_by_tokens(rollouts: Rollouts, budget: int, *, packed: bool = False) -> list[list[int]]:
    """Indices of the rollouts in each micro-batch of `split_by_tokens`.

    Of all ways to cut the rows, sorted by length, the one with the fewest padded positions, MICRO_BATCH_COST for each
    micro-batch included.
    """
    sizes = rollouts.positions
    teachers = [prompt.teacher for prompt in rollouts.prompts]
    order = sorted(range(len(rollouts)), key=lambda i: (teachers[i] or "", -sizes[i], i))
    cost, begins = [0], [0]  # of the best cut of the first n rows: positions, and where its last micro-batch begins
    for stop in range(1, len(order) + 1):
        best = (cost[stop - 1] + sizes[order[stop - 1]] + MICRO_BATCH_COST, stop - 1)
        for begin in range(stop - 2, -1, -1):
            positions = (
                sum(map(sizes.__getitem__, order[begin:stop])) if packed else (stop - begin) * sizes[order[begin]]
            )
            if positions > budget or teachers[order[begin]] != teachers[order[stop - 1]]:
                break
            best = min(best, (cost[begin] + positions + MICRO_BATCH_COST, begin))
        cost.append(best[0])
        begins.append(best[1])
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        groups.insert(0, order[begins[stop] : stop])
        stop = begins[stop]
    return groups


def balanced(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank so that the sums of sizes are about equal: the largest first, each to the least loaded."""
    shares, loads = [list[int]() for _ in range(ranks)], [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return shares


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of all parts in order. Where only some parts have an annotation, the others get its neutral value."""
    joined = {}
    for name in PER_COMPLETION:
        values = [getattr(part, name) for part in parts]
        if any(value is not None for value in values):
            filled = [_neutral(name, part) if v is None else v for part, v in zip(parts, values, strict=True)]
            joined[name] = tuple(x for value in filled for x in value)
    return replace(parts[0], **joined)


def _neutral(name: str, part: Rollouts) -> tuple[Any, ...]:
    return tuple((1.0,) * n for n in part.lengths) if name == "token_weights" else (None,) * len(part)
