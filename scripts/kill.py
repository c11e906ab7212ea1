"""Kill runs at random moments with SIGKILL, resume them, and compare what they leave with runs that nobody killed.

    python scripts/kill.py [KILLS] [SEED] [KIND...]

Prints a line for each kind of run; exits with 1 if any differs. Metrics, evaluations, searches, samples and the saved student
must be equal bit for bit, but for what was asked of a server; of that nothing may be missing in its usage log.
"""

import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from safetensors.torch import load_file

from conftest import miniature_recipe
from oprd.demo.task import sums, write_jsonl
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from serving import FaultyServer, served
from train.runs import evaluations, metrics, read_lines, searches

CLEAN = multiprocessing.get_context("forkserver")
"""Runs are forked from a process that has imported everything and computed nothing: torch's threads do not survive a fork."""
CLEAN.set_forkserver_preload(["oprd.train.run", "oprd.train.setup", "transformers"])


def recipes(folder: Path, url: str) -> dict[str, dict]:
    """Kinds of runs, each of a few seconds. `url`: of the server that teaches the last one."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    write_jsonl(train, sums(64, seed=1, held_out=False))
    write_jsonl(held_out, sums(6, seed=2, held_out=True))
    evaluation = {"benchmarks": [str(held_out)], "samples": 1, "max_completion_length": 24}
    short = {"group_size": 2, "max_completion_length": 24}
    effopd = {"every": 2, "score": "objective", "validation_prompts": 4}
    base = miniature_recipe(folder, train)["student"]
    kinds = {
        "plain, evaluated": {"evaluation": evaluation, "eval_steps": 2},
        "EffOPD": {"extrapolation": effopd, "save_steps": 1},
        "LoRA with dropout, two updates": {
            "student": base | {"lora": {"r": 4, "dropout": 0.1}},
            "rollout": short | {"updates_per_rollout": 2},
            "objective": {"type": "opd_sampled"},
        },
        "a checkpoint every 2nd step, one kept": {"save_steps": 2, "save_total_limit": 1},
        "served": {"teacher": served(url), "objective": {"type": "opd_sampled"}},
    }
    return {name: miniature_recipe("", train, max_steps=6, rollout=short) | options for name, options in kinds.items()}


def run(tree: dict, folder: Path) -> None:
    """Run, or go on with, a recipe in `folder`."""
    torch.set_num_threads(1)
    with (folder.parent / "errors.txt").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    run_recipe(parse_recipe(tree | {"output_dir": str(folder), "resume_from_checkpoint": "latest"}))


def start(tree: dict, folder: Path) -> BaseProcess:
    """`run` in a process of its own."""
    child = CLEAN.Process(target=run, args=(tree, folder))
    child.start()
    return child


def left(folder: Path) -> list[object]:
    """Everything of a run that must not depend on kills."""
    (weights,) = (folder / "student").glob("*model.safetensors")
    student = {name: value.numpy().tobytes() for name, value in load_file(weights).items()}
    rows = [{name: x for name, x in row.items() if not name.startswith("teacher/")} for row in metrics(folder)]
    return [rows, evaluations(folder), searches(folder), read_lines(folder / "samples.jsonl"), student]


def killed(tree: dict, folder: Path, whole_seconds: float, rng: random.Random) -> int:
    """Run to the end, killed now and then; the number of kills."""
    kills = 0
    while True:
        child, patience = start(tree, folder), rng.uniform(0.05, 0.8) * whole_seconds
        child.join(patience if kills < 6 else 600)
        if child.exitcode is None:
            child.kill()
            child.join()
        if child.exitcode != -signal.SIGKILL:
            assert child.exitcode == 0, (folder.parent / "errors.txt").read_text()
            return kills
        kills += 1


def booked(folder: Path) -> int:
    """Requests in the usage log."""
    with sqlite3.connect(folder / "teacher_cache.sqlite") as log:
        return log.execute("SELECT SUM(requests) FROM usage").fetchone()[0]


def main() -> int:
    """Kill at least so many times over all kinds, or those that are named."""
    wanted, seed = (int(given) for given in [*sys.argv[1:3], *("30", "0")[len(sys.argv[1:3]) :]])
    torch.set_num_threads(1)
    rng, failed = random.Random(seed), 0
    imports = CLEAN.Process(target=int)  # no run is timed with them
    imports.start()
    imports.join()
    with tempfile.TemporaryDirectory() as place, FaultyServer() as server:
        kinds = recipes(Path(place), server.url)
        kinds = {name: kinds[name] for name in sys.argv[3:] or kinds}
        for name, tree in kinds.items():
            home = Path(place) / name
            home.mkdir()
            began = time.monotonic()
            first = start(tree, home / "whole")
            first.join()
            assert first.exitcode == 0, (home / "errors.txt").read_text()
            seconds, kills, runs, different = time.monotonic() - began, 0, 0, 0
            whole = left(home / "whole")
            while kills < wanted / len(kinds):
                run, before = home / f"run {runs}", server.requests
                kills += killed(tree, run, seconds, rng)
                runs += 1
                different += left(run) != whole
                if server.requests > before:
                    failed += booked(run) < server.requests - before
                    print(f"{name}: {server.requests - before} requests, {booked(run)} booked", flush=True)
            failed += different
            print(f"{name}: {kills} kills in {runs} runs, {different} differ", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
