"""From ragged rollouts to padded tensors: the only padding outside the Hugging Face engine."""

from collections.abc import Sequence

import torch

from oprd.types import MicroBatch, Places, Rollouts


def collate(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
    logprobs: tuple[tuple[float, ...], ...] | None = None,
    places: Sequence[Places] | None = None,
) -> MicroBatch:
    """Prompt and completion of each row behind each other, padded on the right to the longest."""
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    return MicroBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        prompt_lengths=tuple(map(len, prompt_ids)),
        completion_lengths=tuple(map(len, completion_ids)),
        logprobs=logprobs,
        places=None if places is None else tuple(places),
    )


def collate_student(rollouts: Rollouts, *, pad_id: int, device: torch.device) -> MicroBatch:
    """The rollouts behind the prompts as the student reads them."""
    pairings = rollouts.pairings
    return collate(
        [prompt.token_ids for prompt in rollouts.prompts],
        rollouts.completion_ids,
        pad_id=pad_id,
        device=device,
        logprobs=rollouts.logprobs,
        places=None
        if pairings is None
        else [pairing.own(length) for pairing, length in zip(pairings, rollouts.lengths, strict=True)],
    )


def split_by_tokens(rollouts: Rollouts, budget: int) -> list[Rollouts]:
    """Micro-batches of at most `budget` padded positions, of one teacher each, similar lengths together.

    A single completion over the budget goes alone. Empty completions go along: their weight is zero.
    """
    return [rollouts.take(rows) for rows in rows_by_tokens(rollouts, budget)]


def rows_by_tokens(rollouts: Rollouts, budget: int) -> list[list[int]]:
    """Which rollouts make up each of `split_by_tokens`' micro-batches."""

    def size(i: int) -> int:
        return len(rollouts.prompts[i].token_ids) + len(rollouts.completion_ids[i])

    order = sorted(range(len(rollouts)), key=lambda i: (rollouts.prompts[i].teacher or "", -size(i), i))
    groups: list[list[int]] = []
    for i in order:
        longest = size(groups[-1][0]) if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= budget
        if fits and rollouts.prompts[groups[-1][0]].teacher == rollouts.prompts[i].teacher:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
