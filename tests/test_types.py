"""Which tokens are supervised, where their hidden states are, and how two tokenizations of them correspond."""

import pytest
import torch

from oprd.data.batching import collate
from oprd.types import ALL_TOKENS, HiddenSpec, TokenAlignment, TokenSelection

CPU = torch.device("cpu")
SELECTIONS = [
    (TokenSelection(keep="first", k=2), [12, 13, 23]),
    (TokenSelection(keep="last", k=2), [13, 14, 23]),
    (TokenSelection(keep="last", k=1), [14, 23]),
    (TokenSelection(keep="last", k=100), [12, 13, 14, 23]),
]


def batch(**annotations):
    """Completions of 3 and 1 tokens behind prompts of 2 and 3; an id is 10 * (row + 1) + position."""
    return collate([[10, 11], [20, 21, 22]], [[12, 13, 14], [23]], pad_id=0, device=CPU, **annotations)


def alignments():
    """The teacher has 2 tokens for the first completion's 3: the first ends behind 13, the second behind 14."""
    return (
        TokenAlignment(teacher_ids=(91, 92), student_length=3, student_index=(1, 2), teacher_index=(0, 1)),
        TokenAlignment(teacher_ids=(93,), student_length=1, student_index=(0,), teacher_index=(0,)),
    )


def teacher_batch():
    return collate([[80], [80]], [[91, 92], [93]], pad_id=0, device=CPU, alignments=alignments(), reads="teacher")


def test_positions_are_row_times_width_plus_position():
    assert batch().input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 23, 0]]
    assert batch().positions(ALL_TOKENS).tolist() == [2, 3, 4, 8]
    assert batch().positions(ALL_TOKENS, shift=1).tolist() == [1, 2, 3, 7]


def test_hidden_states_are_gathered_at_the_token_or_one_to_the_left_where_it_is_predicted():
    b = batch()
    states = torch.stack([b.input_ids, -b.input_ids], dim=-1)  # [B, T, 2]
    at_token = b.gather(states, HiddenSpec(block=1, at="token", tokens=ALL_TOKENS))
    predicting = b.gather(states, HiddenSpec(block=1, at="predicting", tokens=ALL_TOKENS))
    assert at_token.tolist() == [[12, -12], [13, -13], [14, -14], [23, -23]]
    assert predicting.tolist() == [[11, -11], [12, -12], [13, -13], [22, -22]]
    assert b.sampled_ids(ALL_TOKENS).tolist() == [12, 13, 14, 23]


@pytest.mark.parametrize(("tokens", "expected"), SELECTIONS)
def test_k_is_cut_to_each_completions_own_length(tokens, expected):
    b = batch()
    assert b.sampled_ids(tokens).tolist() == expected
    assert sum(map(tokens.count, (3, 1))) == len(expected)


@pytest.mark.parametrize(("tokens", "expected"), SELECTIONS)
def test_a_server_finds_the_selected_tokens_among_all(tokens, expected):
    b = batch()
    assert b.sampled_ids(ALL_TOKENS)[b.selected(tokens)].tolist() == expected


def test_ragged_numbers_follow_the_selection():
    b = batch(token_scores=((1.0, 2.0, 3.0), (4.0,)))
    assert b.ragged(b.token_scores, TokenSelection(keep="last", k=2)).tolist() == [2.0, 3.0, 4.0]


def test_the_next_token_exists_inside_the_completion_only():
    ids, exists = batch().next_ids(ALL_TOKENS)
    assert exists.tolist() == [True, True, False, False]
    assert ids[exists].tolist() == [13, 14]
    ids, exists = batch().next_ids(TokenSelection(keep="first", k=1))
    assert (ids[exists].tolist(), exists.tolist()) == ([13], [True, False])


def test_an_empty_completion_supervises_nothing():
    b = collate([[1, 2]], [[]], pad_id=0, device=CPU)
    for keep in ("all", "first", "last"):
        tokens = TokenSelection(keep=keep, k=3)
        assert len(b.positions(tokens)) == len(b.positions(tokens, shift=1)) == tokens.count(0) == 0
        assert b.selected(tokens).tolist() == b.spans(tokens).tolist() == []


def test_the_same_completions_behind_other_prompts_are_gathered_in_the_same_order():
    other = collate([[1], [2, 3, 4, 5, 6, 7]], [[12, 13, 14], [23]], pad_id=0, device=CPU)
    assert other.sampled_ids(ALL_TOKENS).tolist() == batch().sampled_ids(ALL_TOKENS).tolist()


def test_without_an_alignment_every_token_is_aligned_and_its_own_span():
    assert batch().aligned(ALL_TOKENS).tolist() == [True] * 4
    assert batch().spans(TokenSelection(keep="last", k=2)).tolist() == [0, 1, 2]


def test_a_student_batch_keeps_all_tokens_and_says_which_are_aligned():
    b = batch(alignments=alignments())
    assert b.sampled_ids(ALL_TOKENS).tolist() == [12, 13, 14, 23]
    assert b.aligned(ALL_TOKENS).tolist() == [False, True, True, True]
    # 12 and 13 are one token of the teacher's, 14 and 23 are one each
    assert b.spans(ALL_TOKENS).tolist() == [0, 0, 1, 2]


def test_a_teacher_batch_is_gathered_at_its_aligned_tokens():
    b = teacher_batch()
    assert b.sampled_ids(ALL_TOKENS).tolist() == [91, 92, 93]
    # of the student's last token, 14, only the teacher's last token is aligned
    assert b.sampled_ids(TokenSelection(keep="last", k=1)).tolist() == [92, 93]
    assert b.positions(ALL_TOKENS, shift=1).tolist() == [0, 1, 3]


def test_student_tokens_behind_the_last_aligned_one_belong_to_no_span():
    alignment = TokenAlignment(teacher_ids=(91, 92), student_length=4, student_index=(0, 2), teacher_index=(0, 1))
    b = collate([[1]], [[5, 6, 7, 8]], pad_id=0, device=CPU, alignments=(alignment,))
    assert b.spans(ALL_TOKENS).tolist() == [0, 1, 1, -1]
    assert b.aligned(ALL_TOKENS).tolist() == [True, False, True, False]
    # a selection that begins inside a span has that span's end first
    assert b.spans(TokenSelection(keep="last", k=3)).tolist() == [0, 0, -1]


def test_a_prompt_without_a_token_has_nothing_that_predicts_the_first_sampled_one():
    with pytest.raises(AssertionError, match="predicts"):
        collate([[]], [[5]], pad_id=0, device=CPU)
