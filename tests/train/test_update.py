"""One update: however the step is split, the weights are the same."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import miniature_recipe
from oprd.algorithm import Update, mean_update
from oprd.clock import Clock
from oprd.data.batching import split_by_tokens
from oprd.errors import TrainingStopped
from oprd.recipe import parse_recipe
from oprd.train.loop import train
from oprd.train.setup import setup
from oprd.types import Rollouts
from train.runs import (
    MIXTURE,
    assert_same_weights,
    largest_difference,
    metrics,
    rollouts_of,
    update,
    weights,
    weights_after,
)

OBJECTIVES = {
    "oprd": {"type": "oprd", "tokens": "all"},
    "oprd-l2-sequence": {"type": "oprd", "normalization": "l2", "reduction": "sequence_mean", "weight": 100.0},
    "oprd-last-8": {"type": "oprd", "tokens": {"last": 8}, "layers": "even"},
    "opd": {"type": "opd"},
    "opd-sequence": {"type": "opd", "divergence": "jsd", "reduction": "sequence_mean"},
    "opd-sampled": {"type": "opd_sampled"},
    "mixture": MIXTURE,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, train_file):
    """A run that no test trains."""
    return setup(parse_recipe(miniature_recipe(tmp_path_factory.mktemp("parts"), train_file)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_micro_batching_gives_the_same_weights(name, tmp_path, train_file, parts):
    # eps above the noise of float32 sums: Adam divides by the gradient's size, and near zero it would amplify rounding
    options = {"objective": OBJECTIVES[name], "adam_epsilon": 1e-4}
    whole = weights_after(tmp_path, train_file, **options)
    assert_same_weights(whole, weights_after(tmp_path, train_file, **options, micro_batch_tokens=1))
    assert_same_weights(whole, weights_after(tmp_path, train_file, **options, micro_batch_tokens=100))
    assert largest_difference(whole, weights(parts)) > 1e-4, "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_rows_give_the_weights_of_padded_ones(name, tmp_path, train_file):
    options = {"objective": OBJECTIVES[name], "adam_epsilon": 1e-4}
    shapes: list[tuple[int, ...]] = []
    parts = setup(parse_recipe(miniature_recipe(tmp_path, train_file, packing=True, health_tokens=0, **options)))
    for lm in (parts.method.student.lm, parts.method.teacher.model.lm):
        lm.backbone.register_forward_pre_hook(
            lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    update(parts), update(parts)
    assert {rows for rows, _ in shapes} == {1}
    assert_same_weights(weights_after(tmp_path, train_file, **options), weights(parts))


def test_the_order_of_the_completions_does_not_matter(tmp_path, train_file):
    after = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        run = setup(parse_recipe(miniature_recipe(tmp_path, train_file, adam_epsilon=1e-4)))
        update(run, rollouts_of(run).take(order))
        after.append(weights(run))
    assert_same_weights(*after)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path, train_file):
    student = miniature_recipe(tmp_path, train_file)["student"] | {"gradient_checkpointing": True}
    plain = weights_after(tmp_path, train_file, objective=MIXTURE)
    assert_same_weights(plain, weights_after(tmp_path, train_file, objective=MIXTURE, student=student))


def test_micro_batches_keep_to_the_budget_and_to_one_teacher(parts):
    rollouts = rollouts_of(parts)
    named = tuple(replace(p, teacher="ab"[i % 2]) for i, p in enumerate(rollouts.prompts))
    rollouts = replace(rollouts, prompts=named)
    for budget in (1, 60, 100, 10_000):
        micros = split_by_tokens(rollouts, budget)
        assert sorted(ids for m in micros for ids in m.completion_ids) == sorted(rollouts.completion_ids)
        for micro in micros:
            sizes = [len(p.token_ids) + len(c) for p, c in zip(micro.prompts, micro.completion_ids, strict=True)]
            assert len(micro) == 1 or len(micro) * max(sizes) <= budget
            assert len({prompt.teacher for prompt in micro.prompts}) == 1


def test_a_step_without_a_supervised_token_stops_with_the_reason(parts):
    empty = Rollouts(prompts=parts.prompts[:2], completion_ids=((), ()), finished=(True, True))
    with pytest.raises(TrainingStopped, match="every completion is empty"):
        parts.method.update(empty, 1, Clock(torch.device("cpu")))


@pytest.mark.parametrize("updates", [1, 3])
def test_non_finite_steps_are_skipped_and_counted_once_and_stop_the_run(updates, tmp_path, train_file):
    rollout = {"group_size": 2, "max_completion_length": 48, "updates_per_rollout": updates}
    tree = miniature_recipe(tmp_path / "run", train_file, max_skipped_steps=2, health_tokens=0, rollout=rollout)
    run = setup(parse_recipe(tree))
    with torch.no_grad():
        run.method.teacher.model.lm.model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    before = weights(run)
    with pytest.raises(
        TrainingStopped, match=r"2 steps in a row had a non-finite loss or gradient.* the last is step 2"
    ):
        train(run)
    for name, value in weights(run).items():
        assert torch.equal(value, before[name]), name
    assert [row["train/skipped_steps/total"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_skipped_update_among_others_is_counted_and_leaves_the_step_standing():
    fine = Update(losses=(1.0,), supervised=(8,), grad_norm=2.0, finite=True)
    lost = Update(losses=(math.nan,), supervised=(8,), grad_norm=math.nan, finite=False)
    assert mean_update((fine, lost, replace(fine, losses=(3.0,)))) == replace(fine, losses=(2.0,))
    assert not mean_update((lost, lost)).finite


def test_a_launchers_accumulation_precision_and_compilation_change_nothing(tmp_path, train_file, monkeypatch):
    alone = weights_after(tmp_path / "alone", train_file)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert_same_weights(weights_after(tmp_path / "launched", train_file), alone, atol=0)
