"""EffOPD in a run: scores are true, accepted weights are trained on, and nothing is lost or decided twice."""

import math

import pytest
import torch
from torch.testing import assert_close

from conftest import MODELS, miniature_recipe
from oprd.effopd import Scores, validation_prompts
from oprd.errors import Interrupted
from oprd.models.generate import Sampling
from oprd.recipe import parse_recipe
from oprd.train import loop, validation
from oprd.train.run import run_recipe
from oprd.train.setup import Parts, setup
from oprd.train.validation import validate
from train.runs import assert_equal_runs, metrics, read_lines, searches, update

pytestmark = pytest.mark.slow

TEACHER = {"model": str(MODELS / "teacher")}


def parts_of(tmp_path, train_file, effopd=None, **changes) -> Parts:
    config = {"validation_prompts": 16, "score": "objective"} | (effopd or {})
    return setup(parse_recipe(miniature_recipe(tmp_path, train_file, extrapolation=config, **changes)))


def score(parts: Parts, step: int = 1) -> Scores:
    assert parts.recipe.extrapolation is not None
    return validate(parts, parts.recipe.extrapolation, step)


# The scores


def test_accuracy_is_that_of_the_verifier(tmp_path, train_file):
    effopd = {"validation_prompts": 24, "validation_samples": 2, "score": "accuracy"}
    parts = parts_of(tmp_path, train_file, effopd, student=TEACHER)
    with parts.verifier:
        scores = score(parts)
    assert len(scores.values) == 24
    assert set(scores.values) <= {0.0, 0.5, 1.0}
    assert scores.mean > 0.8  # the embedded teacher: 0.93
    assert scores.tokens > 24 * 2 * 10


def test_the_objectives_score_is_minus_its_mean_and_zero_at_the_teacher(tmp_path, train_file):
    parts = parts_of(tmp_path, train_file)
    prompts = validation_prompts(parts.recipe.extrapolation, parts.prompts, parts.recipe.seed)
    assert len({prompt.row for prompt in prompts}) == 16
    scores = score(parts)
    assert score(parts) == scores
    assert all(value < 0 for value in scores.values)
    same = parts_of(tmp_path, train_file, student=TEACHER)
    assert_close(score(same).mean, 0.0, atol=1e-6, rtol=0)


def test_the_objectives_score_has_the_weights_of_the_step(tmp_path, train_file):
    fading = {"type": "oprd", "tokens": "all", "weight": {"from": 2, "to": 0, "steps": 3}}
    parts = parts_of(tmp_path, train_file, objective=fading)
    written = parts.engine.generate(parts.prompts[:4], Sampling(temperature=1.0, max_new_tokens=48), seed=1)
    values = [[v for _, v in validation._minus_objective(parts, written, step)] for step in (1, 2, 3)]
    for at_1, at_2, at_3 in zip(*values, strict=True):
        assert at_1 == pytest.approx(2 * at_2)
        assert at_2 < 0 == at_3


def test_a_completion_without_a_supervised_token_is_no_perfect_one(tmp_path, train_file, monkeypatch):
    parts = parts_of(tmp_path, train_file)
    real = validation._minus_objective
    plain = score(parts)
    first = validation_prompts(parts.recipe.extrapolation, parts.prompts, parts.recipe.seed)[0].row
    monkeypatch.setattr(
        validation, "_minus_objective", lambda *x: [(row, None if row == first else v) for row, v in real(*x)]
    )
    assert score(parts).values == (min(plain.values[1:]), *plain.values[1:])
    monkeypatch.setattr(validation, "_minus_objective", lambda *x: [(row, None) for row, _ in real(*x)])
    assert score(parts).mean == -math.inf
    # a loss that is not a number is another thing, and is never accepted
    monkeypatch.setattr(validation, "_minus_objective", lambda *x: [(row, math.nan) for row, _ in real(*x)])
    assert math.isnan(score(parts).mean)


def test_the_engine_writes_with_the_accepted_weights(tmp_path, train_file):
    parts = parts_of(tmp_path, train_file)
    update(parts)
    written = []

    def generate():
        sampling = Sampling(temperature=1.0, max_new_tokens=48)
        return parts.engine.generate(parts.prompts[:4], sampling, seed=3).completion_ids

    def falling_after_two() -> Scores:
        written.append(generate())
        return Scores(values=(float(len(written) <= 3),), tokens=0)

    assert parts.extrapolation.after_update(1, falling_after_two)["accepted"] == 4.0
    assert generate() == written[2]
    assert written[2] != written[0]


def test_scoring_leaves_no_count_behind_and_draws_alike_for_every_candidate(tmp_path, train_file):
    parts = parts_of(tmp_path, train_file, objective={"type": "opd_sampled", "redraw": True})
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, two = score(parts), score(parts)
    assert one == two
    assert torch.equal(torch.random.get_rng_state(), state)
    (objective,) = parts.method.student.objectives
    objective._count("of/the/candidate", 1.0)
    score(parts)
    assert objective.take_metrics() == ()


@pytest.mark.parametrize(("kind", "cut"), [("accuracy", False), ("objective", True)])
def test_accuracy_is_scored_on_whole_completions_whatever_the_schedule_allows_yet(kind, cut, tmp_path, train_file):
    rollout = {"max_completion_length": 48, "length_schedule": {"from": 4, "steps": 9}}
    parts = parts_of(tmp_path, train_file, {"score": kind, "validation_prompts": 8}, rollout=rollout)
    with parts.verifier:
        mean_length = score(parts).tokens / 8
    assert mean_length == 4 if cut else 20 < mean_length <= 48


# Runs


def stop_after(step: int, monkeypatch) -> None:
    real = loop._save

    def save_and_stop(parts, progress, saving):
        real(parts, progress, saving)
        saving.finish()
        if progress.step == step:
            raise Interrupted

    monkeypatch.setattr(loop, "_save", save_and_stop)


@pytest.mark.parametrize(
    ("effopd", "changes"),
    [
        ({}, {}),
        pytest.param({"score": "accuracy", "validation_samples": 2, "every": 2}, {}, marks=pytest.mark.slow),
        pytest.param(
            {},
            {"student": {"model": str(MODELS / "base"), "lora": {"r": 4, "alpha": 8}}, "logging_steps": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["objective", "accuracy", "lora"],
)
def test_a_run_resumed_across_a_search_equals_the_uninterrupted_run(effopd, changes, tmp_path, train_file, monkeypatch):
    effopd = {"validation_prompts": 4, "score": "objective", "factors": [2.0, 4.0]} | effopd
    options = {"max_steps": 4, "save_steps": 3, "learning_rate": 1e-4, "extrapolation": effopd} | changes
    whole, run = (miniature_recipe(tmp_path / name, train_file, **options) for name in ("whole", "run"))
    run_recipe(parse_recipe(whole))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            run_recipe(parse_recipe(run))
    # a search that a lost step has logged is forgotten
    with (tmp_path / "run" / "searches.jsonl").open("a") as lines:
        lines.write('{"step": 4, "accepted": 99}\n')
    parts = setup(parse_recipe(run | {"resume_from_checkpoint": "latest"}))
    loop.train(parts)
    found = searches(tmp_path / "whole")
    assert found == searches(tmp_path / "run")
    assert [row["step"] for row in found] == ([2, 4] if "every" in effopd else [1, 2, 4])
    assert any(row["accepted"] for row in found)
    if "student" not in changes:
        assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    # every search is in the metrics, whatever is logged beside it, and so is what all cost together
    rows = metrics(tmp_path / "whole")
    assert rows == metrics(tmp_path / "run")
    searched = [row for row in rows if "extrapolation/factor/last" in row]
    assert [row["tokens/extrapolation/sum"] for row in searched] == [row["tokens"] for row in found]
    if "logging_steps" not in changes:
        each = [row["tokens/generated/sum"] + row.get("tokens/extrapolation/sum", 0) for row in rows]
        assert rows[-1]["tokens/generated/total"] == sum(each)
    seconds = [row.get("time/extrapolation_s/sum", 0) for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert all((second > 0.01) == (row in searched) for second, row in zip(seconds, rows, strict=True))
    moved = sum(weight.numel() for weight in parts.extrapolation.state().values())
    assert found[0]["snapshot_mib"] == pytest.approx(2 * moved * 4 / 2**20, abs=1e-3)
