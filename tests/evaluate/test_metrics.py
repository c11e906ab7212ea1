"""Scores: by hand, by brute force, by simulation."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.errors import ConfigError
from oprd.evaluate import metrics

TABLE = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)


def test_scores_by_hand():
    assert metrics.avg_at_k(TABLE).tolist() == [0.25, 1.0, 0.0]
    assert metrics.best_at_k(TABLE).tolist() == [1.0, 1.0, 0.0]
    # one of four is right: 3 of the 6 pairs contain it
    assert metrics.pass_at_k(TABLE, 2).tolist() == pytest.approx([0.5, 1.0, 0.0])


def test_a_majority_by_hand_with_ties_and_without_votes():
    extracted = [["1", "1 ", "2", None], ["3", "4", None, None], [None, None, None, None]]
    correct = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    assert metrics.maj_at_k(extracted, correct).tolist() == [1.0, 0.5, 0.0]


def test_distinct_4_by_hand():
    # 1234 2341 3412 4123 1234: five 4-grams, four of them distinct
    assert metrics.distinct_n([np.array([1, 2, 3, 4, 1, 2, 3, 4])]) == 4 / 5
    assert metrics.distinct_n([np.array([1, 2]), np.array([], int)]) == 0.0
    assert metrics.distinct_n([]) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2**18]), max_size=9), max_size=6), st.integers(1, 5))
def test_distinct_n_counts_the_n_grams_within_completions(completions, n):
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    rows = [np.array(ids, np.int32) for ids in completions]
    assert metrics.distinct_n(rows, n) == len(set(grams)) / max(1, len(grams))


def test_distinct_4_of_a_million_tokens_takes_forty_bytes_each():
    ids = np.random.default_rng(0).integers(0, 150_000, 1_000_000)
    tracemalloc.start()
    assert metrics.distinct_n([ids]) == 1.0
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(row, data):
    k = data.draw(st.integers(1, len(row)))
    subsets = list(itertools.combinations(row, k))
    assert metrics.pass_at_k(np.array([row]), k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_pass_at_1_is_the_average_and_pass_at_all_is_the_best(row):
    table = np.array([row])
    assert metrics.pass_at_k(table, 1)[0] == pytest.approx(metrics.avg_at_k(table)[0])
    assert metrics.pass_at_k(table, len(row))[0] == metrics.best_at_k(table)[0]


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ConfigError, match="pass@k needs 1 <= k <= samples"):
        metrics.pass_at_k(TABLE, k)


@pytest.mark.slow
def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials = 300
    covered = 0
    for trial in range(trials):
        difficulty = rng.beta(1, 1, size=100)
        values = rng.binomial(4, difficulty) / 4
        low, high = metrics.bootstrap_interval(values, seed=trial, resamples=1000)
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / trials <= 0.985  # 95% less and more three standard errors, and a little for its bias
