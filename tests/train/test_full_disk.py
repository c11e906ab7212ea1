"""A disk that fills up ends a run with a message; what was there stays, and the run goes on to the same end.

A limit on the size of files stands in for the full disk: the kernel refuses the bytes beyond it.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import miniature_recipe
from oprd import student
from oprd.errors import DiskError
from oprd.evaluate import evaluate
from oprd.recipe import parse_recipe
from oprd.train import checkpoint, loop, run_folder
from oprd.train.run import run_recipe
from processes import room
from train.runs import assert_equal_runs


@pytest.fixture(scope="module")
def tree(tmp_path_factory, train_file, held_out_file):
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 1, "max_completion_length": 24, "limit": 4}
    rollout = {"group_size": 2, "max_completion_length": 24}
    extrapolation = {"every": 2, "score": "objective", "validation_prompts": 2}
    tree = miniature_recipe(
        out, train_file, max_steps=3, save_steps=1, evaluation=evaluation, rollout=rollout, extrapolation=extrapolation
    )
    run_recipe(parse_recipe(tree))
    return tree


MOMENTS = {
    "run.json": (run_folder, "write_json", 1, 0),
    "recipe.yaml": (run_folder, "write_atomically", 1, 0),
    "searches.jsonl": (loop, "append_jsonl", 1, 0),
    "metrics.jsonl": (loop, "append_jsonl", 2, 1500),
    "samples.jsonl": (loop, "append_jsonl", 3, 0),
    "weights of a checkpoint": (checkpoint, "save", 2, 100_000),
    "state.json": (checkpoint, "write_atomically", 2, 100),
    "SHA256SUMS": (checkpoint, "write_atomically", 3, 0),
    "the student": (student, "get_model_state_dict", 1, 50_000),
    "completions of the evaluation": (loop, "_evaluate", 1, 0),
    "evaluations.jsonl": (evaluate, "append_jsonl", 1, 100),
    "result.json": (loop, "write_json", 1, 0),
}
"""Where the disk fills up: what is called (for a file of this name), the number of the call, the bytes there is room for."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_meets_a_full_disk_says_so_and_goes_on_to_the_same_end(moment, tree, tmp_path, monkeypatch, capsys):
    owner, name, number, size = MOMENTS[moment]
    recipe = tree | {"output_dir": str(tmp_path / "run")}
    real, calls = getattr(owner, name), []
    with contextlib.ExitStack() as full:

        def call(*given, **named):
            calls.append("." not in moment or given[0].name == moment)
            if calls[-1] and sum(calls) == number:
                full.enter_context(room(size))
            return real(*given, **named)

        monkeypatch.setattr(owner, name, call)
        with pytest.raises(DiskError, match=r"cannot write .*run.*make room"):
            run_recipe(parse_recipe(recipe))
    monkeypatch.setattr(owner, name, real)
    assert not list((tmp_path / "run").rglob(".*.tmp")), "half a file takes room"
    run_recipe(parse_recipe(recipe | {"resume_from_checkpoint": "latest"}))
    assert_equal_runs(Path(tree["output_dir"]), tmp_path / "run")


def test_a_report_that_does_not_fit_leaves_the_old_page_and_exits_with_3(tree, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("the old page")
    command = [sys.executable, "-m", "oprd", "report", tree["output_dir"], "--out", str(page)]
    limit = [sys.executable, "-c", LIMITED, "100000"]
    done = subprocess.run([*limit, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert f"cannot write {page}" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert page.read_text() == "the old page"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""
