"""Nothing is lost: a run that was stopped, killed or interrupted goes on as if it had not been."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT, miniature_recipe
from oprd.algorithm import Distillation
from oprd.errors import Interrupted, RunFolderError
from oprd.files import append_jsonl, read_jsonl
from oprd.recipe import parse_recipe
from oprd.train import checkpoint, loop
from oprd.train.checkpoint import load_weights
from oprd.train.interrupt import Interrupt
from oprd.train.run import run_recipe
from oprd.train.run_folder import RunFolder
from train.runs import assert_equal_runs, assert_same_weights, metrics, saved_student

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory, train_file, held_out_file):
    """A recipe with evaluations on the way, and the uninterrupted run of it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 2, "max_completion_length": 48}
    tree = miniature_recipe(out, train_file, max_steps=6, eval_steps=2, evaluation=evaluation)
    run_recipe(parse_recipe(tree))
    return tree


def test_a_run_interrupted_after_a_step_and_resumed_equals_the_uninterrupted_run(tree, tmp_path, monkeypatch):
    recipe = tree | {"output_dir": str(tmp_path / "run")}
    real_step = loop._step

    def step_and_interrupt(parts, progress, *rest):
        real_step(parts, progress, *rest)
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


KILLED_INSIDE_A_CHECKPOINT = """
import os, signal, sys, torch
from oprd.train import checkpoint
real, calls = checkpoint.write_atomically, []
def write(path, text):
    calls.append(path)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, text)
checkpoint.write_atomically = write
torch.set_num_threads(1)
from oprd.recipe import load_recipe
from oprd.train.run import run_recipe
run_recipe(load_recipe(sys.argv[1]))
"""


def test_kill_9_while_a_checkpoint_is_being_written_loses_nothing(tree, tmp_path):
    """The process kills itself in its second checkpoint, when the shards are written but not renamed."""
    recipe = tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"}
    recipe |= {"evaluation": {}, "eval_steps": None}  # which changes nothing in what is trained
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", KILLED_INSIDE_A_CHECKPOINT, str(tmp_path / "recipe.yaml")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [".step-000004.tmp", "step-000002"]
    run_recipe(parse_recipe(recipe))
    assert_equal_runs(Path(tree["output_dir"]), tmp_path / "run", evaluated=False)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_ctrl_c_on_the_command_line_leaves_a_run_that_resumes(tree, tmp_path):
    recipe = tree | {"output_dir": str(tmp_path / "run"), "max_steps": 4000, "save_steps": 10_000, "eval_steps": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"evaluation": {}}))
    command = [sys.executable, "-m", "oprd", "train", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "run" / "samples.jsonl").exists():
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, message = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 130, message
    assert "resume_from_checkpoint=latest" in message
    assert "Traceback" not in message
    (saved,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert int(saved.name[5:]) == len(metrics(tmp_path / "run"))


def test_a_checkpoint_holds_what_is_trained_and_resumes_exactly(tmp_path, train_file):
    objective = {"type": "oprd", "tokens": "all", "layers": [2]}
    tree = miniature_recipe(tmp_path / "whole", train_file, objective=objective, save_steps=1, max_steps=2)
    run_recipe(parse_recipe(tree))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    first = tmp_path / "run" / "checkpoints" / "step-000001"
    stored = load_weights(first)
    assert {name.split(".")[2] for name in stored if name.startswith("model.layers.")} == {"0", "1"}
    assert "model.norm.weight" not in stored
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": str(first)}))
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_an_incomplete_checkpoint_is_never_picked_up(tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoint.find_checkpoint(folder, "latest") is None  # the run starts at the first step
    (folder / "step-000002").mkdir(parents=True)
    (folder / "step-000002" / "state.json").write_text("{}")
    (folder / "step-000003").mkdir()
    (folder / ".step-000009.tmp").mkdir()
    (folder / ".step-000009.tmp" / "state.json").write_text("{}")
    assert checkpoint.find_checkpoint(folder, "latest") == folder / "step-000002"


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


def test_a_run_whose_last_evaluation_fails_has_its_student_and_goes_on_with_other_settings(tree, tmp_path, monkeypatch):
    recipe = tree | {"output_dir": str(tmp_path / "run"), "eval_steps": None}

    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    real = loop._evaluate
    monkeypatch.setattr(loop, "_evaluate", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_recipe(parse_recipe(recipe))
    monkeypatch.setattr(loop, "_evaluate", real)
    student = saved_student(tmp_path / "run")
    smaller = {"rollout": recipe["rollout"] | {"engine": {"type": "hf", "cache_tokens": 400}}}
    smaller |= {"evaluation": recipe["evaluation"] | {"samples": 1}, "micro_batch_tokens": 4096}
    done = run_recipe(parse_recipe(recipe | smaller | {"resume_from_checkpoint": "latest"}))
    assert done.result.evaluations[0].samples == 1
    assert all(torch.equal(value, student[name]) for name, value in saved_student(tmp_path / "run").items())
    assert "12" in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.parametrize("place", ["targets", "step_metrics"])
def test_an_error_in_a_step_loses_no_whole_step(place, tree, tmp_path, monkeypatch):
    """Before the weights change the step before is saved; once they have changed, and the step is counted, the step itself."""
    recipe = tree | {"output_dir": str(tmp_path / "run"), "save_steps": 100, "eval_steps": None, "evaluation": {}}
    owner = Distillation if place == "targets" else loop
    real, calls = getattr(owner, place), []

    def fail(*given, **named):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("broken")
        return real(*given, **named)

    monkeypatch.setattr(owner, place, fail)
    with pytest.raises(RuntimeError, match="broken"):
        run_recipe(parse_recipe(recipe))
    monkeypatch.setattr(owner, place, real)
    (saved,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{len(metrics(tmp_path / 'run')) + (place == 'step_metrics'):06d}"
    run_recipe(parse_recipe(recipe | {"resume_from_checkpoint": "latest"}))
    ours, whole = saved_student(tmp_path / "run"), saved_student(Path(tree["output_dir"]))
    assert all(torch.equal(value, whole[name]) for name, value in ours.items())


def test_a_folder_in_use_is_refused_naming_the_process_that_has_it(tree, tmp_path):
    shutil.copytree(tree["output_dir"], tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.hold()
    recipe = parse_recipe(tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"})
    with pytest.raises(RunFolderError, match=f"is in use by process {os.getpid()} on "):
        run_recipe(recipe)
    folder.release()
    assert run_recipe(recipe).result.steps == 6


def test_lines_of_a_log_end_at_newlines_only(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [{"step": 1, "completion": "1+\u20285\u2028\u0085"}, {"step": 2, "completion": "né"}]
    for row in rows:
        append_jsonl(folder.samples, row)
    whole = folder.samples.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (len(whole), whole.index("é".encode()) + 1):
        folder.samples.write_bytes(whole[:end])
        assert folder.logs_until(1, {}) == {folder.samples: first}
        assert read_jsonl(folder.samples) == rows[: 1 + (end == len(whole))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_asks_the_loop_to_stop_and_is_remembered(number):
    with Interrupt() as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.asked
        assert interrupt.signal == number


def test_a_resume_with_other_prompts_is_refused(tree, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(Path(tree["data"]["prompts"]).read_text())
    recipe = tree | {
        "output_dir": str(tmp_path / "run"),
        "data": {"prompts": str(data)},
        "max_steps": 1,
        "evaluation": {},
    }
    recipe |= {"eval_steps": None}
    run_recipe(parse_recipe(recipe))
    (tmp_path / "run" / "result.json").unlink()
    data.write_text(data.read_text().replace("+", "-", 1))
    with pytest.raises(RunFolderError, match="began with other prompts"):
        run_recipe(parse_recipe(recipe | {"resume_from_checkpoint": "latest"}))


def test_a_finished_run_goes_on_for_more_steps_where_the_learning_rate_is_constant(tmp_path, train_file):
    options = {"lr_scheduler_type": "constant", "max_steps": 2}
    whole = miniature_recipe(tmp_path / "whole", train_file, **options)
    run_recipe(parse_recipe(whole | {"max_steps": 3}))
    part = whole | {"output_dir": str(tmp_path / "part")}
    run_recipe(parse_recipe(part))
    run_recipe(parse_recipe(part | {"max_steps": 3, "resume_from_checkpoint": "latest"}))
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    assert_same_weights(saved_student(tmp_path / "part"), saved_student(tmp_path / "whole"), atol=0.0)


def test_more_steps_are_refused_where_they_would_change_the_learning_rate(tree):
    changed = tree | {"max_steps": 8, "resume_from_checkpoint": "latest"}
    with pytest.raises(
        RunFolderError, match="max_steps: 6 then, 8 now; the learning rate of every step depends on max_steps"
    ):
        run_recipe(parse_recipe(changed))


def test_a_run_killed_at_random_moments_ends_as_if_nobody_had():
    """A share of `scripts/kill.py`, whose kinds of runs are more."""
    command = [sys.executable, str(ROOT / "scripts" / "kill.py"), "3", "0", "EffOPD"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = re.fullmatch(r"EffOPD: (\d+) kills in \d+ runs, 0 differ", done.stdout.strip())
    assert found, done.stdout + done.stderr
    assert (done.returncode, int(found[1]) >= 3) == (0, True)
