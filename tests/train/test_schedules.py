"""Rollout schedules: how long completions may be, and how often they are used."""

import math

import pytest
import torch
from torch.testing import assert_close

from conftest import miniature_recipe
from oprd.data.batching import concatenate, split_by_tokens
from oprd.errors import ConfigError, Interrupted
from oprd.models.generate import Sampling
from oprd.recipe import RolloutConfig, parse_recipe
from oprd.train import loop
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from train.runs import (
    assert_equal_runs,
    assert_same_weights,
    metrics,
    rollouts_of,
    update,
    weights,
    weights_after,
    write_completions,
)

pytestmark = pytest.mark.slow

SAMPLED = {"type": "opd_sampled"}


def rollout(**options) -> RolloutConfig:
    base = {"student": {"model": "s"}, "teacher": {"type": "local", "model": "t"}, "data": {"prompts": "p"}}
    return parse_recipe(base | {"output_dir": "o", "rollout": options}).rollout


def test_lengths_by_hand():
    linear = rollout(max_completion_length=100, length_schedule={"from": 20, "steps": 5})
    assert [linear.length_at(step) for step in (1, 2, 3, 4, 5, 6, 99)] == [20, 40, 60, 80, 100, 100, 100]
    assert rollout(max_completion_length=100).length_at(7) == 100


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"from": 200, "steps": 5}, "asks for 200 tokens, max_completion_length is 100"),
        ({"from": 0, "steps": 5}, "asks for 0 tokens, max_completion_length is 100"),
        ({"from": 20, "steps": 1}, r"length_schedule\.steps: should be greater than 1, got 1"),
        (
            {"from": 20, "steps": 5, "lengths": [10, 30]},
            r"length_schedule\.lengths: unknown key of an earlier version: length_schedule is linear: \{from: 64",
        ),
    ],
)
def test_a_senseless_schedule_is_refused(schedule, message):
    with pytest.raises(ConfigError, match=message):
        rollout(max_completion_length=100, length_schedule=schedule)


@pytest.mark.parametrize("tokens", [{"first": 20}, "all"])
def test_omni_opd_without_room_for_a_chunk_is_refused(tokens, tmp_path, train_file):
    tree = miniature_recipe(
        tmp_path, train_file, objective={"type": "omni_opd", "chunk_tokens": 24, "tokens": tokens},
        rollout={"max_completion_length": 64, "length_schedule": {"from": 16, "steps": 9}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"chunks of 24 tokens, and completions of (16|20) have room for none"):
        parse_recipe(tree)


@pytest.mark.parametrize("objective", [{"type": "oprd", "tokens": "all"}, {"type": "opd"}, SAMPLED])
def test_a_growing_rollout_trains_on_what_was_sampled(objective, tmp_path, train_file, capsys):
    options = {"max_completion_length": 48, "length_schedule": {"from": 6, "steps": 3}}
    tree = miniature_recipe(tmp_path / "run", train_file, objective=objective, max_steps=2, rollout=options)
    run_recipe(parse_recipe(tree))
    rows = metrics(tmp_path / "run")
    assert rows[0]["rollout/length/mean"] == 6
    assert rows[0]["rollout/truncated/share"] == 1
    assert [row["tokens/supervised/sum"] for row in rows] == [row["tokens/generated/sum"] for row in rows]
    assert rows[1]["rollout/length/mean"] > 20
    assert "were cut at" not in capsys.readouterr().err  # they were meant to be


def test_one_prompt_many_times_gives_many_completions(tmp_path, train_file):
    tree = miniature_recipe(tmp_path, train_file, prompts_per_step=8, data={"prompts": str(train_file), "limit": 1})
    parts = setup(parse_recipe(tree))
    prompts = parts.sampler.batch(0)
    assert [prompt.row for prompt in prompts] == [0] * 8
    sampling = Sampling(temperature=1.0, max_new_tokens=48, samples=2)
    written, _ = parts.method.collect(prompts, sampling, 1)
    assert len(written) == 16
    assert len(set(written.completion_ids)) > 4


# Several updates on one rollout


def test_on_policy_updates_have_importance_weights_of_one(tmp_path, train_file):
    plain = weights_after(tmp_path, train_file, objective=SAMPLED)
    parts = setup(parse_recipe(miniature_recipe(tmp_path, train_file, objective=SAMPLED, health_tokens=0)))
    for _ in range(2):
        update(parts, parts.method.with_sampling_logprobs(rollouts_of(parts)))
    assert_same_weights(weights(parts), plain, atol=1e-5)


def test_an_off_policy_update_is_weighted_by_the_probabilities_at_sampling_time(tmp_path, train_file):
    tree = miniature_recipe(tmp_path, train_file, objective=SAMPLED, learning_rate=1e-2, health_tokens=0)
    parts = setup(parse_recipe(tree))
    sampled = parts.method.with_sampling_logprobs(rollouts_of(parts))
    update(parts, sampled)
    now = parts.method.with_sampling_logprobs(rollouts_of(parts))
    logprobs = [torch.tensor([x for row in r.sampling_logprobs for x in row]) for r in (now, sampled)]
    ratios = (logprobs[0] - logprobs[1]).exp()
    assert ratios.max() > 2 > 0.9 > ratios.min()
    (objective,) = parts.method.student.objectives
    objective.take_metrics()
    plain, weighted = (_values(parts, rollouts) for rollouts in (rollouts_of(parts), sampled))
    assert_close(weighted, plain * ratios.clamp(max=2), rtol=1e-4, atol=1e-6)
    (metric,) = objective.take_metrics()
    assert metric.name == "train/reverse_kl/clipped/share"
    assert math.isclose(metric.sum / metric.count, float((ratios >= 2).float().mean()), rel_tol=1e-6)


def _values(parts, rollouts) -> torch.Tensor:
    """The objective's value at every token."""
    micro = concatenate(split_by_tokens(rollouts, 10**9))
    return parts.method.student.evaluate(parts.method.batch(micro), parts.method.targets(micro))[0]


def test_the_datasets_completions_are_neither_generated_nor_weighted(tmp_path, train_file):
    given = write_completions(tmp_path / "given.jsonl", train_file)
    rollout = {"max_completion_length": 60, "source": {"type": "dataset"}, "updates_per_rollout": 2}
    omni = {"type": "omni_opd", "chunks": 1, "chunk_tokens": 4, "continuations": 2}
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "run", given, objective=omni, rollout=rollout, max_steps=1)))
    (row,) = metrics(tmp_path / "run")
    assert row["tokens/generated/sum"] == row["tokens/generated/total"] == 0
    assert row["tokens/supervised/sum"] > 30
    assert "train/omni_opd/clipped/share" not in row


@pytest.mark.parametrize("objective", [{"type": "oprd", "tokens": "all"}, SAMPLED], ids=["oprd", "sampled"])
def test_a_step_makes_its_updates_and_resumes_exactly(objective, tmp_path, train_file, monkeypatch):
    options = {"group_size": 2, "max_completion_length": 48, "updates_per_rollout": 3}
    tree = miniature_recipe(tmp_path / "whole", train_file, objective=objective, rollout=options, max_steps=3)
    tree |= {"save_steps": 2, "lr_scheduler_type": "linear"}
    run_recipe(parse_recipe(tree))
    rows = metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(("train/reverse_kl/clipped/share" in row) == (objective is SAMPLED) for row in rows)
    if objective is SAMPLED:  # weights other than one, which they would be were the log-probabilities taken anew
        assert any(row["train/reverse_kl/clipped/share"] > 0 for row in rows)
    # 9 updates in all, three of them a step: the rate falls by a third a step
    assert [row["train/learning_rate/last"] for row in rows] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    real = loop._save

    def save_and_stop(parts, progress, saving):
        real(parts, progress, saving)
        saving.finish()
        states = parts.method.student.optimizer.state.values()
        assert {int(state["step"]) for state in states} == {3 * progress.step}
        raise Interrupted

    monkeypatch.setattr(loop, "_save", save_and_stop)
    with pytest.raises(Interrupted):
        run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(loop, "_save", real)
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"}))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_warm_up_rises_from_above_zero_to_the_peak(kind, tmp_path, train_file):
    """3 of 10 updates: a quarter, a half and three quarters of the peak, then the schedule as without a warm-up."""
    options = {"lr_scheduler_type": kind, "warmup_ratio": 0.3, "max_steps": 10, "learning_rate": 8e-3}
    student = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, **options))).method.student
    rates = []
    for _ in range(10):
        rates.append(student.learning_rate)
        student.optimizer_step()
    assert rates[:4] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3])
    left = [i / 7 for i in range(7)]  # shares of what is behind the warm-up
    wanted = {
        "cosine": [4e-3 * (1 + math.cos(math.pi * share)) for share in left],
        "linear": [8e-3 * (1 - share) for share in left],
        "constant_with_warmup": [8e-3] * 7,
    }
    assert rates[3:] == pytest.approx(wanted[kind])
