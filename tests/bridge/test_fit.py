"""The closed form against a fit on the rows themselves."""

import runpy

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from conftest import ROOT
from oprd.bridge.fit import is_held_out
from oprd.bridge.moments import Features, Moments
from oprd.bridge.solve import (
    auto_rank,
    canonical_directions,
    cosine_sums,
    partner,
    ridge_strength,
    solve,
    squared_correlations,
)
from oprd.errors import DataError

S, T, N = 6, 9, 4000
NONE = Features.random(torch.zeros(2, T), 0, seed=0)


@pytest.fixture
def rows():
    """Teacher states of which three directions follow from the student's, the others are noise."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(N, S, generator=g, dtype=torch.float64) * torch.linspace(3, 0.5, S) + 2
    mix = torch.randn(S, 3, generator=g, dtype=torch.float64)
    shared = student @ mix @ torch.randn(3, T, generator=g, dtype=torch.float64)
    return student, shared + 0.5 * torch.randn(N, T, generator=g, dtype=torch.float64) - 1


def moments(student, teacher, parts=1) -> Moments:
    sums = Moments.zeros(student.shape[1], teacher.shape[1])
    for s, t in zip(student.chunk(parts), teacher.chunk(parts), strict=True):
        sums.add(s, t)
    return sums


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(4, 4, [1, 2, 3, 4]), (4, 6, [1, 3, 4, 6]), (3, 2, [1, 2, 2]), (1, 5, [5]), (28, 36, None)],
)
def test_blocks_pair_by_relative_depth(student, teacher, expected):
    mapped = [partner(block, student, teacher) for block in range(1, student + 1)]
    assert mapped[-1] == teacher
    assert expected is None or mapped == expected
    assert mapped == sorted(mapped)


def test_covariances_by_hand():
    sums = moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]]))
    # means 2 and 2; deviations -1, 1 and -2, 2
    assert list(map(float, sums.covariances)) == [1.0, 2.0, 4.0]


def test_rows_in_pieces_give_the_same_sums(rows):
    whole, pieces = moments(*rows), moments(*rows, parts=7)
    for name in Moments.__slots__:
        assert_close(getattr(whole, name), getattr(pieces, name), rtol=1e-12, atol=0)


def test_the_projections_are_those_of_pca_and_least_squares_on_the_rows(rows):
    student, teacher = rows
    found = solve(moments(student, teacher), moments(student, teacher), NONE, max_rank=4, name="b").projections
    centred = teacher - teacher.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    overlap = (found.teacher @ directions[:4].T).abs().diagonal()
    assert_close(overlap, torch.ones(4, dtype=torch.float64), atol=1e-8, rtol=0)
    target = centred @ found.teacher.T
    expected = torch.linalg.lstsq(student - student.mean(0), target).solution.T
    assert_close(found.student, expected, atol=1e-3, rtol=1e-3)


def test_a_smaller_rank_is_the_beginning_of_a_larger_one_up_to_the_ridge(rows):
    sums = moments(*rows)
    large, small = (solve(sums, sums, NONE, max_rank=r, name="b").projections for r in (5, 2))
    assert_close(large.teacher[:2], small.teacher)
    assert_close(large.student[:2], small.student, atol=1e-3, rtol=1e-3)


def test_squared_correlations_find_the_shared_directions(rows):
    student, teacher = rows
    fit, held_out = moments(student[:3000], teacher[:3000]), moments(student[3000:], teacher[3000:])
    canonical = squared_correlations(canonical_directions(fit, NONE), held_out)
    assert auto_rank(canonical) == 3
    assert float(canonical[:3].min()) > 0.8
    assert float(canonical[3:].max()) < 0.1


def test_canonical_correlation_by_hand():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y = torch.tensor([[2.0], [1.0], [4.0], [3.0]])
    sums = moments(x, y)
    # covariance 0.75, variances 1.25: correlation 0.6
    assert_close(
        squared_correlations(canonical_directions(sums, NONE), sums), torch.tensor([0.36], dtype=torch.float64)
    )


def test_canonical_coordinates_have_unit_variance_and_patterns_move_them_alone(rows):
    sums = moments(*rows)
    found, (c_ss, _, c_tt) = canonical_directions(sums, NONE), sums.covariances
    eye = torch.eye(S, dtype=torch.float64)
    assert_close(found.student @ c_ss @ found.student.T, eye, atol=1e-3, rtol=0)
    assert_close((found.teacher @ c_tt @ found.teacher.T).diagonal(), torch.ones(S, dtype=torch.float64))
    # a step along a pattern moves its own coordinate by as much, and no other one
    assert_close(found.pattern @ found.student.T, eye, atol=1e-3, rtol=0)
    # patterns are those by which the rows themselves follow from their coordinates
    student = rows[0] - rows[0].mean(0)
    expected = torch.linalg.lstsq(student @ found.student.T, student).solution
    assert_close(found.pattern, expected, atol=1e-2, rtol=1e-2)


def test_features_say_what_no_linear_map_does():
    """|x| has no linear correlation with x; with features the fit finds it, and without any it does not."""
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    student = torch.cat([x.abs(), torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))], dim=1)
    correlations = []
    for count in (0, 16):
        features = Features.random(x[:3000], count, seed=0)
        fit, held_out = (moments(student[rows], features(x[rows])) for rows in (slice(3000), slice(3000, None)))
        correlations.append(float(squared_correlations(canonical_directions(fit, features), held_out)[0]))
    assert correlations[0] < 0.05
    assert correlations[1] > 0.9


def test_the_largest_ridge_within_the_slack_is_taken(rows):
    c_ss, c_st, c_tt = moments(*rows).covariances
    strict, loose = (ridge_strength(c_ss, c_st, float(c_tt.trace()), float(N), slack=slack) for slack in (0.0, 0.03))
    assert loose > strict


def test_auto_rank_is_the_last_direction_at_half_or_above():
    assert auto_rank(torch.tensor([0.9, 0.4, 0.5, 0.49])) == 3
    assert auto_rank(torch.tensor([0.4, 0.1])) == 0


def test_the_cosine_of_every_rank_is_that_of_the_first_entries():
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 50, 7, generator=g, dtype=torch.float64)
    expected = [cosine_similarity(u[:, :r], v[:, :r], dim=-1).sum() for r in range(1, 8)]
    assert_close(cosine_sums(u, v), torch.stack(expected))


def test_the_ridge_grows_with_noise_and_shrinks_with_rows(rows):
    def strength(noise: float, n: int) -> float:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(n, 20, generator=g, dtype=torch.float64)
        y = x @ torch.randn(20, 3, generator=g, dtype=torch.float64) + noise * torch.randn(n, 3, generator=g).double()
        c_ss, c_st, c_tt = moments(x, y).covariances
        return ridge_strength(c_ss, c_st, float(c_tt.trace()), float(n))

    assert strength(10.0, 60) > strength(0.1, 60)
    assert strength(10.0, 60) > strength(10.0, 6000)


def test_the_gradient_fit_is_no_better_than_the_closed_form_on_held_out_rows(rows):
    student, teacher = rows
    fit, held = slice(0, 3000), slice(3000, None)
    sums, measured = moments(student[fit], teacher[fit]), moments(student[held], teacher[held])
    closed = solve(sums, measured, NONE, max_rank=3, name="b").projections
    fit_by_gradient = runpy.run_path(str(ROOT / "benchmarks" / "bridge_gradient_fit.py"))["fit_by_gradient"]
    p_s, p_t, mean = fit_by_gradient(student[fit], teacher[fit], max_rank=3, seed=0)

    def cosine(p_s, p_t, m_s, m_t):
        return cosine_sums((student[held] - m_s) @ p_s.double().T, (teacher[held] - m_t) @ p_t.double().T) / 1000

    ours = cosine(closed.student, closed.teacher, closed.student_mean, closed.teacher_mean)
    theirs = cosine(p_s, p_t, 0.0, mean.double())
    assert bool((ours > theirs - 1e-3).all())


def test_held_out_prompts_are_spread_evenly():
    assert [i for i in range(20) if is_held_out(i, 0.25)] == [3, 7, 11, 15, 19]
    assert sum(is_held_out(i, 0.1) for i in range(2000)) == 200


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s, t: (s[:9], t[:9]), "b: 9 rows to fit and 9 held out are too few for rank 5; it needs 10 and 2"),
        (lambda s, t: (s * 0 + 3.3, t), "b: the student's hidden states are the same at every position"),
        (lambda s, t: (s, t * torch.nan), "b: the teacher's hidden states hold NaN"),
    ],
)
def test_states_that_no_bridge_fits_are_named(spoil, reason, rows):
    sums = moments(*spoil(*rows))
    with pytest.raises(DataError, match=reason):
        solve(sums, sums, NONE, max_rank=5, name="b")
