"""Nothing is lost: a run that was stopped, killed or interrupted goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.errors import Interrupted, RunFolderError
from oprd.train import checkpoint
from oprd.train.checkpoint import load_weights
from oprd.train.run import run_recipe

MACHINE = ("time/", "memory/", "training_seconds/")


def metrics(folder: Path) -> list[dict[str, float]]:
    """Every step's line without what depends on the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert evaluations(one) == evaluations(other)


def evaluations(folder: Path) -> list[dict[str, float]]:
    """Every evaluation without what depends on the machine."""
    file = folder / "evaluations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in row.items() if k != "training_seconds"} for row in rows]


@pytest.fixture(scope="module")
def tree(tmp_path_factory, train_file, held_out_file):
    """A recipe with evaluations on the way, dropout-free, and the uninterrupted run of it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 2, "max_completion_length": 48}
    tree = miniature_recipe(out, train_file, max_steps=6, eval_steps=2, evaluation=evaluation)
    run_recipe(parse_recipe(tree))
    return tree


def test_a_run_interrupted_after_a_step_and_resumed_equals_the_uninterrupted_run(tree, tmp_path, monkeypatch):
    from oprd.train import loop

    recipe = tree | {"output_dir": str(tmp_path / "run")}
    real_step = loop._step

    def step_and_interrupt(run, progress, *rest):
        real_step(run, progress, *rest)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "_step", step_and_interrupt)
    with pytest.raises(Interrupted, match="after step 3"):
        run_recipe(parse_recipe(recipe))
    monkeypatch.setattr(loop, "_step", real_step)
    run_recipe(parse_recipe(recipe | {"resume_from_checkpoint": "latest"}))
    assert_equal_runs(Path(tree["output_dir"]), tmp_path / "run")


def test_a_run_resumed_from_an_earlier_checkpoint_forgets_what_came_after(tree, tmp_path):
    shutil.copytree(tree["output_dir"], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    earlier = tmp_path / "run" / "checkpoints" / "step-000004"
    with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "torn')
    recipe = tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": str(earlier)}
    run_recipe(parse_recipe(recipe))
    assert_equal_runs(Path(tree["output_dir"]), tmp_path / "run")


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_being_written_loses_nothing(tree, tmp_path):
    """The process kills itself inside the second checkpoint, when its shards are written but not renamed."""
    recipe = tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    suicide = (
        "import os, signal, sys, torch\n"
        "from oprd.train import checkpoint\n"
        "real, calls = checkpoint.write_atomically, []\n"
        "def write(path, text):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(path, text)\n"
        "checkpoint.write_atomically = write\n"
        "torch.set_num_threads(1)\n"
        "from oprd.config.reading import load_recipe\n"
        "from oprd.train.run import run_recipe\n"
        f"run_recipe(load_recipe({str(tmp_path / 'recipe.yaml')!r}))\n"
    )
    killed = subprocess.run([sys.executable, "-c", suicide], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [".step-000004.tmp", "step-000002"]
    run_recipe(parse_recipe(recipe))
    assert_equal_runs(Path(tree["output_dir"]), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_leaves_a_run_that_resumes(tree, tmp_path):
    recipe = tree | {"output_dir": str(tmp_path / "run"), "max_steps": 400, "save_steps": 1000, "evaluation": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "oprd", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "samples.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "resume_from_checkpoint=latest" in told
    assert "Traceback" not in told
    (saved,) = checkpoint.complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert int(saved.name[5:]) == len(metrics(tmp_path / "run"))


def test_a_checkpoint_holds_what_an_earlier_stage_trained_and_this_one_does_not(tmp_path, train_file):
    stages = [
        {"objective": {"type": "oprd", "tokens": "all"}, "max_steps": 2},
        {"objective": {"type": "oprd", "tokens": "all", "layers": [2]}, "max_steps": 2},
    ]
    tree = miniature_recipe(tmp_path / "whole", train_file, stages=stages)
    tree = {key: value for key, value in tree.items() if key not in ("objective", "max_steps")} | {"save_steps": 1}
    tree |= {"save_total_limit": 4}
    run_recipe(parse_recipe(tree))
    before = metrics(tmp_path / "whole")
    final = weights(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    early = checkpoint.with_name("step-000001")
    assert load_weights(early).keys() == load_weights(checkpoint).keys()
    (tmp_path / "whole" / "result.json").unlink()
    run_recipe(parse_recipe(tree | {"resume_from_checkpoint": str(checkpoint)}))
    assert metrics(tmp_path / "whole") == before
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, final[name]), name


def test_an_incomplete_checkpoint_is_never_picked_up(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-000002").mkdir(parents=True)
    (folder / ".step-000009.tmp").mkdir()
    (folder / ".step-000009.tmp" / "state.json").write_text("{}")
    assert checkpoint.find_checkpoint(folder, "latest") == folder / "step-000002"


def test_latest_without_a_checkpoint_starts_at_the_first_step(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints", "latest") is None


def test_resuming_a_finished_run_does_nothing_and_says_the_same(tree):
    again = run_recipe(parse_recipe(tree | {"resume_from_checkpoint": "latest"}))
    assert again.result.steps == 6
    assert again.result.evaluations[0].problems == 12


def test_a_folder_that_holds_another_run_is_refused(tree):
    with pytest.raises(RunFolderError, match="holds another run"):
        run_recipe(parse_recipe(tree))


def test_a_checkpoint_of_another_recipe_is_refused_naming_the_difference(tree):
    changed = tree | {"learning_rate": 5e-3, "resume_from_checkpoint": "latest"}
    with pytest.raises(RunFolderError, match=r"learning_rate: 0\.001 then, 0\.005 now"):
        run_recipe(parse_recipe(changed))


def test_a_checkpoint_of_another_run_is_refused(tree, tmp_path):
    other = tmp_path / "checkpoints" / "step-000002"
    shutil.copytree(Path(tree["output_dir"]) / "checkpoints" / "step-000004", other)
    with pytest.raises(RunFolderError, match="belongs to another run"):
        run_recipe(parse_recipe(tree | {"resume_from_checkpoint": str(other)}))
    with pytest.raises(RunFolderError, match="is not a complete checkpoint"):
        run_recipe(parse_recipe(tree | {"resume_from_checkpoint": str(tmp_path)}))
