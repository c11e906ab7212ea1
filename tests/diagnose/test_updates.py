"""What is said about the path of a run, on updates made by hand and on a run of the miniature."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from conftest import miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.diagnose.updates import _early, _left, _measure, _update, diagnose_updates, rescaled
from oprd.errors import ConfigError, RunFolderError
from oprd.models import load_student
from oprd.report.html import write_report
from oprd.train.build import build
from oprd.train.checkpoint import load_weights
from oprd.train.loop import train


def matrix(*singular: float, rotate: int = 0) -> torch.Tensor:
    """Singular values along the axes, the left ones shifted by `rotate`."""
    return torch.diag(torch.tensor(singular, dtype=torch.float32)).roll(rotate, dims=0)


def test_norm_energy_and_cosine_by_hand():
    update = matrix(3, 2, 1, 1, 1, 0)
    row = _measure(5, 2, "mlp.up_proj", update, torch.full((6, 6), 2 / 3), 2 * update, _left(update))
    assert row.norm == pytest.approx(4.0)  # sqrt(9 + 4 + 1 + 1 + 1)
    assert row.relative_norm == pytest.approx(1.0)  # W_0 has norm sqrt(36 * 4/9) = 4
    assert row.top_energy == pytest.approx(15 / 16)
    assert row.cosine == pytest.approx(1.0)
    assert row.subspace_cosine == pytest.approx(1.0)
    # two of the four top directions are shared: the principal angles are 0, 0, 90, 90 degrees
    other = matrix(6, 5, 4, 3, 2, 1, rotate=2)
    last = matrix(6, 5, 4, 3, 2, 1)
    turned = _measure(5, 2, "mlp.up_proj", other, torch.ones(6, 6), last, _left(last))
    assert turned.cosine == 0.0
    assert turned.subspace_cosine == pytest.approx(0.5)


def test_an_update_of_zero_has_no_direction_and_breaks_nothing():
    last = matrix(1, 1, 1, 1, 1, 1)
    row = _measure(1, 1, "k", torch.zeros(6, 6), torch.ones(6, 6), last, _left(last))
    assert (row.norm, row.cosine, row.top_energy) == (0.0, 0.0, 0.0)
    assert math.isfinite(row.subspace_cosine)


def test_going_far_early_keeps_the_direction_and_takes_the_final_norm():
    early, final = (
        {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)},
        {"a": torch.tensor([0.0, 10.0]), "b": torch.ones(2)},
    )
    far = rescaled(early, final)
    for name, value in rescaled(early, final, 0.5).items():
        assert_close(value, far[name] / 2)
    assert_close(far["a"], torch.tensor([6.0, 8.0]))
    assert_close(far["b"], torch.zeros(2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train_file, held_out_file):
    out = tmp_path_factory.mktemp("updates") / "run"
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 1, "max_completion_length": 48}
    tree = miniature_recipe(out, train_file, max_steps=4, save_steps=1, save_total_limit=9, evaluation=evaluation)
    run = build(parse_recipe(tree))
    train(run)
    return tree, out, run


def test_a_checkpoints_weights_are_read_back_whole(finished):
    _, out, run = finished
    stored = load_weights(out / "checkpoints" / "step-000004")
    trained = {name: p for name, p in run.lm.model.named_parameters() if p.requires_grad}
    assert set(trained) <= set(stored)
    for name, value in trained.items():
        assert torch.equal(stored[name], value.detach()), name


def test_a_run_is_diagnosed_and_drawn(finished):
    _, out, _ = finished
    table = json.loads(diagnose_updates(out, (0.25, 0.5)).read_text())
    assert {row["step"] for row in table["matrices"]} == {1, 2, 3, 4}
    assert {row["block"] for row in table["matrices"]} == {1, 2, 3, 4}
    assert {row["kind"] for row in table["matrices"]} >= {"self_attn.q_proj", "mlp.down_proj"}
    last = [row for row in table["matrices"] if row["step"] == 4]
    assert all(row["subspace_cosine"] == pytest.approx(1.0, abs=1e-3) for row in last)
    norms = [sum(r["norm"] for r in table["matrices"] if r["step"] == step) for step in (1, 2, 3, 4)]
    assert norms == sorted(norms)
    (score,) = table["far_early"]
    assert (score["early_step"], score["final_step"]) == (1, 4)
    assert all(0 <= score[name] <= 1 for name in ("before", "early", "rescaled", "final"))
    assert [share for share, _ in score["along"]] == [0.25, 0.5]
    page = write_report([out], out / "report.html").read_text()
    for title in ("Update by matrix kind", "go far early, from step 1 of 4", "norm of the final update by depth"):
        assert title in page


def test_early_is_counted_from_the_last_checkpoint_there_is(capsys):
    assert _early((20, 40, 200)) == 20
    assert "which is not early" not in capsys.readouterr().err
    # a run of 500 steps that was stopped at 40, and one that keeps the last two checkpoints
    assert _early((4, 20, 40)) == 4
    assert _early((400, 500)) == 400
    assert "that of step 400 of 500, which is not early" in " ".join(capsys.readouterr().err.split())


def test_of_a_lora_student_the_product_of_the_adapter_is_the_update(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, max_steps=2, save_steps=1, save_total_limit=9)
    tree |= {"student": tree["student"] | {"lora": {"r": 4, "alpha": 8}}}
    run = build(parse_recipe(tree))
    train(run)
    start = load_student(parse_recipe(miniature_recipe(tmp_path, train_file)).student).state_dict()
    update = _update(tmp_path / "run" / "checkpoints" / "step-000002", start, 8 / 4)
    merged = run.lm.model.merge_and_unload().state_dict()
    for name, value in update.items():
        assert_close(start[name] + value, merged[name], atol=1e-6, rtol=1e-5)
    assert json.loads(diagnose_updates(tmp_path / "run").read_text())["far_early"] == []  # no benchmarks


def test_a_run_without_a_path_is_refused(tmp_path, finished):
    tree, *_ = finished
    with pytest.raises(RunFolderError, match="is not a run folder"):
        diagnose_updates(tmp_path)
    with pytest.raises(ConfigError, match=r"must be positive, got \[0\.5, 0\.0\]"):
        diagnose_updates(tmp_path, (0.5, 0.0))
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(RunFolderError, match="keeps 0 checkpoint"):
        diagnose_updates(tmp_path)
