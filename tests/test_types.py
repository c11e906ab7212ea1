"""Which positions are supervised: the two masks, the selections, the packing."""

import pytest
import torch

from oprd.data.collate import collate
from oprd.types import Reading, TokenSelection, pack

ALL = TokenSelection(keep="all")


def batch():
    """Two completions of 3 and 1 tokens behind prompts of 2 and 3; ids tell row and place."""
    return collate([[10, 11], [20, 21, 22]], [[12, 13, 14], [23]], pad_id=0, device=torch.device("cpu"))


def test_the_completion_mask_is_true_where_sampled_tokens_stand():
    expected = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(batch().completion_mask(ALL), expected)


def test_the_prediction_mask_is_true_one_to_the_left_where_sampled_tokens_are_predicted_from():
    expected = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(batch().prediction_mask(ALL), expected)


def test_packing_goes_completion_by_completion_and_left_to_right():
    b = batch()
    assert pack(b.input_ids, b.completion_mask(ALL)).tolist() == [12, 13, 14, 23]
    assert pack(b.input_ids, b.prediction_mask(ALL)).tolist() == [11, 12, 13, 22]
    assert b.sampled_ids(ALL).tolist() == [12, 13, 14, 23]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (TokenSelection(keep="first_k", k=2), [12, 13, 23]),
        (TokenSelection(keep="last_k", k=2), [13, 14, 23]),
        (TokenSelection(keep="last"), [14, 23]),
        (TokenSelection(keep="last_k", k=100), [12, 13, 14, 23]),
    ],
)
def test_k_is_cut_to_each_completions_own_length(selection, expected):
    b = batch()
    assert b.sampled_ids(selection).tolist() == expected
    assert sum(selection.count(length) for length in (3, 1)) == len(expected)


def test_an_empty_completion_supervises_nothing():
    b = collate([[1, 2]], [[]], pad_id=0, device=torch.device("cpu"))
    for keep in ("all", "first_k", "last_k", "last"):
        selection = TokenSelection(keep=keep, k=3)
        assert not b.completion_mask(selection).any()
        assert not b.prediction_mask(selection).any()
        assert selection.count(0) == 0


def test_the_same_completions_behind_other_prompts_pack_in_the_same_order():
    other = collate([[1], [2, 3, 4, 5, 6, 7]], [[12, 13, 14], [23]], pad_id=0, device=torch.device("cpu"))
    assert other.sampled_ids(ALL).tolist() == batch().sampled_ids(ALL).tolist()


def test_a_reading_picks_the_mask_of_its_place():
    b = batch()
    at_tokens = Reading(block=1, at="completion", tokens=ALL)
    before = Reading(block=1, at="prediction", tokens=ALL)
    assert torch.equal(b.mask(at_tokens), b.completion_mask(ALL))
    assert torch.equal(b.mask(before), b.prediction_mask(ALL))


def test_a_prompt_without_a_token_has_nothing_that_predicts_the_first_sampled_one():
    with pytest.raises(AssertionError, match="predicts"):
        collate([[]], [[5]], pad_id=0, device=torch.device("cpu"))
