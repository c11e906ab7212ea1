"""Rollout schedules: how long completions may be, how often they and their prompts are used again."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from conftest import miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.config.recipe import RolloutConfig
from oprd.data.collate import split_by_tokens
from oprd.errors import ConfigError, Interrupted
from oprd.train.build import build
from oprd.train.log import Clock
from oprd.train.rollouts import rollouts_of_step, with_logprobs
from oprd.train.run import run_recipe
from oprd.train.update import student_batch, update_step
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
    written, _ = rollouts_of_step(run, 1)
    assert len(written) == 16
    assert len(set(written.completion_ids)) > 4


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


def test_a_stale_update_is_weighted_by_the_probabilities_of_the_first(tmp_path, train_file):
    tree = miniature_recipe(tmp_path, train_file, objective=SAMPLED, learning_rate=1e-2, health_tokens=0)
    run = build(parse_recipe(tree))
    stale = with_logprobs(run, rollouts_of(run))
    update_step(run, stale, Clock(torch.device("cpu")))
    fresh = with_logprobs(run, rollouts_of(run))
    ratios = [
        math.exp(now - then)
        for a, b in zip(fresh.logprobs, stale.logprobs, strict=True)
        for now, then in zip(a, b, strict=True)
    ]
    assert max(ratios) > 2 > 0.9 > min(ratios)
    (objective,) = run.stage.objectives
    objective.tallies()
    plain, weighted = (_values(run, rollouts) for rollouts in (rollouts_of(run), stale))
    assert_close(weighted, plain * torch.tensor(ratios).clamp(max=2), rtol=1e-4, atol=1e-6)
    cut = sum(ratio >= 2 for ratio in ratios) / len(ratios)
    assert [tally.total / tally.of for tally in objective.tallies()] == [pytest.approx(cut)]


def _values(run, rollouts) -> torch.Tensor:
    """The objective of every token, of all micro-batches."""
    found = []
    for micro in split_by_tokens(rollouts, 10**9):
        targets = run.teacher.targets(micro, run.stage.distill.teacher_readings, head=True)
        found.append(run.stage.model.eval()(student_batch(run, micro), targets)[0].detach())
    return torch.cat(found)


def test_the_datasets_completions_are_neither_generated_nor_weighted(tmp_path, train_file):
    given = tmp_path / "given.jsonl"
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    given.write_text("".join(json.dumps(row | {"completion": "1+2=3\n\\boxed{3}"}) + "\n" for row in rows))
    rollout = {"group_size": 1, "max_completion_length": 60, "lambda_on_policy": 0.0, "updates_per_rollout": 2}
    omni = {"type": "omni_opd", "chunks": 1, "chunk_tokens": 4, "continuations": 2}
    tree = miniature_recipe(tmp_path / "run", given, objective=omni, rollout=rollout, max_steps=1)
    run_recipe(parse_recipe(tree))
    (row,) = metrics(tmp_path / "run")
    assert row["tokens/generated/sum"] == row["tokens/generated/total"] == 0
    assert row["tokens/supervised/sum"] > 30
    assert "train/omni_opd/clipped/share" not in row


@pytest.mark.parametrize("changes", [{"tokens": "first_k", "k": 20}, {}])
def test_omni_opd_without_room_for_a_chunk_is_refused(changes, tmp_path, train_file):
    rollout = {"max_completion_length": 64, "length_schedule": {"type": "linear", "start": 16, "steps": 9}}
    tree = miniature_recipe(
        tmp_path, train_file, objective={"type": "omni_opd", "chunk_tokens": 24} | changes, rollout=rollout
    )
    with pytest.raises(ConfigError, match=r"chunks of 24 tokens.*have (no )?room"):
        parse_recipe(tree)


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
