"""Rollout schedules: how long completions may be, how often they and their prompts are used again."""

import json

import pytest
import torch

from conftest import miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.config.recipe import RolloutConfig
from oprd.errors import ConfigError, Interrupted
from oprd.train.build import build
from oprd.train.log import Clock
from oprd.train.rollouts import with_logprobs
from oprd.train.run import run_recipe
from oprd.train.update import update_step
from train.test_resume import assert_equal_runs, metrics
from train.test_update import rollouts_of, weights_after_a_step

SAMPLED = {"type": "opd", "estimator": "sampled"}


def rollout(**options: object) -> RolloutConfig:
    base = {"student": {"model": "s"}, "teacher": {"type": "local", "model": "t"}, "data": {"prompts": "p"}}
    return parse_recipe(base | {"output_dir": "o", "rollout": options}).rollout


def test_lengths_by_hand():
    linear = rollout(max_completion_length=100, length_schedule={"type": "linear", "start": 20, "steps": 5})
    assert [linear.length_at(step) for step in (1, 2, 3, 4, 5, 6, 99)] == [20, 40, 60, 80, 100, 100, 100]
    schedule = {"type": "stepwise", "at": [3, 6], "lengths": [10, 30]}
    stepwise = rollout(max_completion_length=100, length_schedule=schedule)
    assert [stepwise.length_at(step) for step in (1, 2, 3, 5, 6, 99)] == [10, 10, 30, 30, 100, 100]
    assert rollout(max_completion_length=100).length_at(7) == 100


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"type": "linear", "start": 200, "steps": 5}, "asks for 200 tokens, max_completion_length is 100"),
        ({"type": "stepwise", "at": [3], "lengths": [10, 30]}, "one length for each of its steps"),
        ({"type": "stepwise", "at": [6, 3], "lengths": [10, 30]}, "the steps rising"),
        ({"type": "cosine"}, "unknown type 'cosine'"),
    ],
)
def test_a_senseless_schedule_is_refused(schedule, told):
    with pytest.raises(ConfigError, match=told):
        rollout(max_completion_length=100, length_schedule=schedule)


@pytest.mark.parametrize("objective", [{"type": "oprd", "tokens": "all"}, {"type": "opd"}, SAMPLED])
def test_a_growing_rollout_trains_on_what_was_sampled(objective, tmp_path, train_file, capsys):
    options = {"max_completion_length": 48, "length_schedule": {"type": "linear", "start": 6, "steps": 3}}
    tree = miniature_recipe(tmp_path / "run", train_file, objective=objective, max_steps=3, rollout=options)
    run_recipe(parse_recipe(tree))
    rows = metrics(tmp_path / "run")
    assert rows[0]["rollout/length/mean"] == 6
    assert rows[0]["rollout/truncated/share"] == 1
    assert [row["tokens/supervised/sum"] for row in rows] == [row["tokens/generated/sum"] for row in rows]
    assert rows[1]["rollout/length/mean"] > 20
    assert "were cut at" not in capsys.readouterr().err  # they were meant to be


def test_one_prompt_many_times_gives_many_completions(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, max_steps=1, prompts_per_step=8)
    tree |= {"data": {"prompts": str(train_file), "limit": 1}}
    run = build(parse_recipe(tree))
    assert {prompt.row for prompt in run.sampler.batch(0).prompts} == {0}
    assert len(run.sampler.batch(0).prompts) == 8
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "other")}))
    (row,) = metrics(tmp_path / "other")
    assert row["tokens/generated/sum"] > 16 * 10


# Several updates with one rollout


def test_the_first_weights_are_one_so_the_first_update_is_the_plain_one(tmp_path, train_file):
    plain = weights_after_a_step(tmp_path / "a", train_file, SAMPLED)
    run = build(parse_recipe(miniature_recipe(tmp_path / "b", train_file, objective=SAMPLED, health_tokens=0)))
    rollouts = rollouts_of(run)
    for _ in range(2):
        # taken again before every update: never stale
        update_step(run, with_logprobs(run, rollouts), Clock(torch.device("cpu")))
    for name, value in run.lm.model.state_dict().items():
        assert float((value - plain[name]).abs().max()) < 1e-5, name


def test_stale_updates_are_weighted_by_the_probabilities_of_the_first(tmp_path, train_file):
    tree = miniature_recipe(tmp_path, train_file, objective=SAMPLED, learning_rate=1e-2)
    run = build(parse_recipe(tree))
    stale = with_logprobs(run, rollouts_of(run))
    update_step(run, stale, Clock(torch.device("cpu")))
    fresh = with_logprobs(run, rollouts_of(run))
    then = [x for row in stale.logprobs for x in row]
    now = [x for row in fresh.logprobs for x in row]
    assert max(abs(a - b) for a, b in zip(then, now, strict=True)) > 0.1


@pytest.mark.parametrize("objective", [{"type": "oprd", "tokens": "all"}, SAMPLED], ids=["oprd", "sampled"])
def test_a_step_makes_its_updates_and_resumes_exactly(objective, tmp_path, train_file, monkeypatch):
    from oprd.train import loop

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
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    real = loop._save

    def save_and_die(run, progress):
        real(run, progress)
        assert {int(state["step"]) for state in run.stage.optimizer.state.values()} == {3 * progress.step}
        raise Interrupted

    monkeypatch.setattr(loop, "_save", save_and_die)
    with pytest.raises(Interrupted):
        run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(loop, "_save", real)
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"}))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())) > 0
