"""A signal saves what is there and ends the process with 128 + its number, wherever it arrives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import MODELS, miniature_recipe
from oprd.errors import Interrupted
from oprd.evaluate.evaluate import Evaluator
from oprd.files import SUMS
from oprd.recipe import parse_recipe
from oprd.train import loop, saving
from oprd.train.checkpoint import checkpoints
from oprd.train.run import run_recipe
from train.runs import assert_equal_runs, evaluations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory, train_file, held_out_file):
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 2, "max_completion_length": 24, "limit": 6}
    rollout = {"group_size": 2, "max_completion_length": 24, "engine": {"type": "hf", "cache_tokens": 180}}
    tree = miniature_recipe(
        out, train_file, max_steps=3, save_steps=10, eval_steps=1, evaluation=evaluation, rollout=rollout
    )
    run_recipe(parse_recipe(tree))
    return tree


@pytest.mark.parametrize("batch", [1, 5, 11])
def test_a_signal_during_an_evaluation_saves_the_step_and_the_resumed_run_evaluates_again(
    batch, tree, tmp_path, monkeypatch
):
    """Three batches an evaluation: before the first step, after the first, and after the last."""
    recipe, done = tree | {"output_dir": str(tmp_path / "run")}, []
    real = Evaluator._checked

    def check_and_signal(self, rollouts):
        done.append(1)
        if len(done) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, rollouts)

    monkeypatch.setattr(Evaluator, "_checked", check_and_signal)
    with pytest.raises(Interrupted) as raised:
        run_recipe(parse_recipe(recipe))
    assert raised.value.signal == signal.SIGTERM
    assert len(done) == batch
    step = {1: 0, 5: 1, 11: 3}[batch]
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{step:06d}"][: step > 0]
    monkeypatch.setattr(Evaluator, "_checked", real)
    run_recipe(parse_recipe(recipe | {"resume_from_checkpoint": "latest"}))
    assert_equal_runs(Path(tree["output_dir"]), tmp_path / "run")
    assert [row["step"] for row in evaluations(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_signal_while_a_checkpoint_is_saved_stops_after_it(tree, tmp_path, monkeypatch):
    recipe = tree | {"output_dir": str(tmp_path / "run"), "save_steps": 1, "evaluation": {}, "eval_steps": None}
    real = saving.write_checkpoint

    def save_and_signal(*given, **named):
        monkeypatch.setattr(saving, "write_checkpoint", real)
        os.kill(os.getpid(), signal.SIGHUP)
        return real(*given, **named)

    monkeypatch.setattr(saving, "write_checkpoint", save_and_signal)
    with pytest.raises(Interrupted, match=r"after step [12]") as stopped:
        run_recipe(parse_recipe(recipe))
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name.endswith(str(stopped.value)[-1])
    assert (last / SUMS).is_file()


def test_a_second_signal_stops_at_once(tree, tmp_path, monkeypatch):
    recipe = tree | {"output_dir": str(tmp_path / "run"), "evaluation": {}, "eval_steps": None}

    def two_signals(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setattr(loop, "step_metrics", two_signals)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(parse_recipe(recipe))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_nohup_ignores_stays_ignored(tree, tmp_path, monkeypatch):
    recipe = tree | {"output_dir": str(tmp_path / "run"), "evaluation": {}, "eval_steps": None, "max_steps": 1}
    monkeypatch.setattr(loop, "progress_note", lambda *_: os.kill(os.getpid(), signal.SIGHUP) or "")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_recipe(parse_recipe(recipe)).result.steps == 1
    finally:
        signal.signal(signal.SIGHUP, before)


WAITING = """
import time
import {module}
def reached(*_, **__):
    print("reached", flush=True)
    time.sleep(600)
{module}.{name} = reached
from oprd.cli import main
main()
"""
PLACES = {
    "loading": ("train", "oprd.train.setup", "load_student", signal.SIGTERM),
    "checking": ("train", "oprd.train.setup", "Prompts", signal.SIGHUP),
    "resuming": ("train", "oprd.train.loop", "whole_checkpoint", signal.SIGINT),
    "fitting a bridge": ("fit-bridge", "oprd.train.fit_bridge", "fit", signal.SIGQUIT),
    "loading for eval": ("eval", "oprd.evaluate.evaluate", "load_frozen", signal.SIGTERM),
    "eval": ("eval", "oprd.evaluate.evaluate", "score", signal.SIGHUP),
}


@pytest.mark.parametrize("place", PLACES)
def test_outside_of_the_loop_a_signal_ends_the_process_with_its_code(place, tree, tmp_path, held_out_file):
    command, module, name, number = PLACES[place]
    recipe = tree | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"}
    if command == "fit-bridge":
        recipe |= {"objective": {"type": "oprd_bridge", "bridge": str(tmp_path / "b.safetensors")}}
        recipe |= {
            "teacher": recipe["teacher"] | {"model": str(MODELS / "wide_teacher")},
            "data": {"prompts": str(held_out_file)},
        }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [
        str(MODELS / "base"),
        str(held_out_file),
        "limit=1",
        "max_completion_length=24",
        "--out",
        str(tmp_path / "eval"),
    ]
    arguments = [command, *(options if command == "eval" else [str(tmp_path / "recipe.yaml")])]
    code = WAITING.format(module=module, name=name)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "reached\n", process.stderr.read()
            process.send_signal(number)
            _, message = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 128 + number, message
    assert "Stopped at once; what was saved before is intact" in message.replace("\n", " ")
    assert "Traceback" not in message
