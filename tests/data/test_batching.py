"""Micro-batches, and the same completions in the tokens of either model."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.data.batching import MICRO_BATCH_COST, balanced, rows_by_tokens, split_by_tokens, student_batch, teacher_batch
from oprd.types import ALL_TOKENS, HiddenSpec, Prompt, Rollouts, TokenAlignment

CPU = torch.device("cpu")


def rollouts(sizes, teachers=None, **annotations):
    """Completions of these lengths behind one-token prompts."""
    teachers = teachers or [None] * len(sizes)
    prompts = [
        Prompt(row=i, messages=(), token_ids=(i,), teacher_token_ids=(50, 51), teacher=name)
        for i, name in enumerate(teachers)
    ]
    ids = tuple(tuple(range(10, 10 + size)) for size in sizes)
    return Rollouts(prompts=tuple(prompts), completion_ids=ids, finished=(True,) * len(sizes), **annotations)


def test_similar_lengths_go_together_and_one_over_the_budget_goes_alone_by_hand():
    # padded sizes with the prompt: 3, 10, 4, 3, 21
    assert rows_by_tokens(rollouts([2, 9, 3, 2, 20]), budget=12) == [[4], [1], [2, 0, 3]]


def test_uneven_rows_are_cut_where_padding_costs_more_than_a_micro_batch():
    # sizes 301, 300, 11, 11: together 4 x 301, in two 2 x 301 + 2 x 11 + one more micro-batch
    assert rows_by_tokens(rollouts([10, 300, 10, 299]), budget=10_000) == [[1, 3], [0, 2]]
    # sizes 31, 11: apart saves 20 positions and costs 64
    assert rows_by_tokens(rollouts([30, 10]), budget=10_000) == [[0, 1]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(1, 2000))
def test_no_cut_of_the_sorted_rows_has_less_padding(sizes, budget):
    def cost(groups):
        return sum(len(group) * (1 + max(group)) + MICRO_BATCH_COST for group in groups)

    ordered = sorted(sizes, reverse=True)
    cuts = [[at for at in range(1, len(sizes)) if choice >> at & 1] for choice in range(0, 2 ** len(sizes), 2)]
    ways = [[ordered[a:b] for a, b in pairwise([0, *cut, len(sizes)])] for cut in cuts]
    allowed = [way for way in ways if all(len(g) == 1 or len(g) * (1 + max(g)) <= budget for g in way)]
    ours = [[sizes[row] for row in rows] for rows in rows_by_tokens(rollouts(sizes), budget)]
    assert cost(ours) == min(map(cost, allowed))


def test_lengths_of_a_real_step_leave_little_padding():
    """Log-normal completions, as a step writes them: nine in ten positions hold a token."""
    generator = np.random.default_rng(0)
    sizes = [int(x) for x in generator.lognormal(np.log(150) - 0.5, 1.0, 64).clip(1, 1024)]
    rows = rollouts(sizes)
    padded = sum(len(part) * (1 + max(part.lengths)) for part in split_by_tokens(rows, 16_384))
    assert sum(size + 1 for size in sizes) / padded > 0.9


def test_completions_are_dealt_out_evenly_over_ranks():
    assert balanced([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]
    generator = np.random.default_rng(0)
    sizes = [int(x) for x in generator.lognormal(np.log(150) - 0.5, 1.0, 128).clip(1, 1024)]
    loads = [sum(sizes[i] for i in share) for share in balanced(sizes, 8)]
    as_written = [sum(sizes[i : i + 16]) for i in range(0, 128, 16)]
    assert max(as_written) > 1.3 * sum(sizes) / 8, "else the example shows nothing"
    assert max(loads) < 1.02 * sum(sizes) / 8


@given(st.lists(st.integers(1, 300), min_size=3, max_size=20), st.integers(1, 3))
def test_every_completion_goes_to_one_rank_and_no_rank_goes_without(sizes, ranks):
    shares = balanced(sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert all(shares)


def test_a_micro_batch_has_one_teacher():
    assert rows_by_tokens(rollouts([2, 2, 2], teachers=["b", "a", "b"]), budget=100) == [[1], [0, 2]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 80))
def test_micro_batches_hold_every_completion_once_within_the_budget(sizes, budget):
    parts = split_by_tokens(rollouts(sizes), budget)
    assert sorted(prompt.row for part in parts for prompt in part.prompts) == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or len(part) * (1 + max(part.lengths)) <= budget


def test_packed_rows_fill_the_budget_and_keep_their_own_positions():
    rows = rollouts([3, 1, 2])
    assert rows_by_tokens(rows, budget=9, packed=True) == [[0, 2, 1]]
    assert rows_by_tokens(rows, budget=8, packed=True) == [[0], [2, 1]]
    batch = student_batch(rows, pad_id=0, device=CPU)
    ids, positions = batch.packed()
    assert ids.tolist() == [[0, 10, 11, 12, 1, 10, 2, 10, 11]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    for at in ("token", "predicting"):
        spec = HiddenSpec(block="last", at=at, tokens=ALL_TOKENS)
        padded = batch.gather(batch.input_ids[..., None].float(), spec)
        assert torch.equal(batch.gather(ids[..., None].float(), spec), padded)


def test_without_an_alignment_the_teacher_has_the_students_completion_behind_its_own_prompt():
    both = rollouts([2, 1], token_scores=((1.0, 2.0), (3.0,)))
    student, teacher = (make(both, pad_id=0, device=CPU) for make in (student_batch, teacher_batch))
    assert student.input_ids.tolist() == [[0, 10, 11], [1, 10, 0]]
    assert student.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert teacher.input_ids.tolist() == [[50, 51, 10, 11], [50, 51, 10, 0]]
    assert (student.token_scores, teacher.reads) == (both.token_scores, "teacher")


def test_with_an_alignment_the_teacher_has_its_own_tokens():
    alignment = TokenAlignment(teacher_ids=(90,), student_length=2, student_index=(1,), teacher_index=(0,))
    batch = teacher_batch(rollouts([2], alignments=(alignment,)), pad_id=0, device=CPU)
    assert (batch.input_ids.tolist(), batch.completion_lengths) == ([[50, 51, 90]], (1,))
