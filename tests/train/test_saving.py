"""Checkpoints are written while training goes on, by steps or by time, and nothing is lost."""

import threading
from pathlib import Path

import pytest

from conftest import miniature_recipe
from oprd.errors import ConfigError, DiskError
from oprd.recipe import parse_recipe
from oprd.train import loop, saving
from oprd.train.checkpoint import checkpoints
from oprd.train.run import run_recipe
from train.runs import assert_equal_runs, metrics


@pytest.fixture
def tree(tmp_path, train_file):
    return miniature_recipe(tmp_path / "whole", train_file, max_steps=3, save_steps=2, health_tokens=0)


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(tree, tmp_path, monkeypatch):
    """The checkpoint of step 2 waits for the end of step 3: what it holds is still of step 2, and from it the run ends alike."""
    run_recipe(parse_recipe(tree))
    went_on, write, step = threading.Event(), saving.write_checkpoint, loop._step

    def late(folder, taken, *given):
        assert went_on.wait(60)
        write(folder, taken, *given)

    def counted(parts, progress, bar):
        step(parts, progress, bar)
        if progress.step == 3:
            assert not checkpoints(parts.folder.checkpoints)
            went_on.set()

    monkeypatch.setattr(saving, "write_checkpoint", late)
    monkeypatch.setattr(loop, "_step", counted)
    run = tmp_path / "run"
    run_recipe(parse_recipe(tree | {"output_dir": str(run)}))
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000002", "step-000003"]
    monkeypatch.undo()
    (run / "result.json").unlink()
    asked = str(run / "checkpoints" / "step-000002")
    run_recipe(parse_recipe(tree | {"output_dir": str(run), "resume_from_checkpoint": asked}))
    assert_equal_runs(Path(tree["output_dir"]), run)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_before_its_next_step(tree, monkeypatch):
    learned, step = threading.Event(), loop._step

    def fails(*_):
        assert learned.wait(60)
        raise DiskError("cannot write: no room")

    def after(parts, progress, bar):
        step(parts, progress, bar)
        if progress.step == 3:
            learned.set()
            next(thread for thread in threading.enumerate() if thread.name == "checkpoint").join(60)

    monkeypatch.setattr(saving, "write_checkpoint", fails)
    monkeypatch.setattr(loop, "_step", after)
    with pytest.raises(DiskError, match="no room"):
        run_recipe(parse_recipe(tree | {"max_steps": 50}))
    assert len(metrics(Path(tree["output_dir"]))) == 3


def test_checkpoints_by_time_are_due_by_the_clock(tree, monkeypatch):
    now = iter(range(0, 10**6, 50))
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(now))
    run_recipe(parse_recipe(tree | {"save_steps": "2 min", "max_steps": 5, "save_total_limit": 9}))
    kept = [path.name for path in checkpoints(Path(tree["output_dir"]) / "checkpoints")]
    assert kept == ["step-000003", "step-000005"]


@pytest.mark.parametrize("wrong", ["0 min", "30", "2 h", 0])
def test_an_interval_is_a_number_of_steps_or_of_minutes(wrong, tree):
    with pytest.raises(ConfigError, match="save_steps"):
        parse_recipe(tree | {"save_steps": wrong})
