"""RIDE against OPRD at equal steps, on the miniature: does a target beyond the teacher teach more?

    python benchmarks/ride.py            # every arm, seeds 0, 1, 2; finished runs are kept in runs/ride
    python benchmarks/ride.py --table    # means and seeds, as in docs/algorithms.md

Student and base are the miniature's base model, the teacher was trained from it. 100 steps of 64 completions, all blocks and
tokens, evaluated on 200 held-out problems, 4 samples each, after 50 and 100 steps. Results: benchmarks/results/ride.json.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS, TRAINING_PROBLEMS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.files import read_jsonl
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
STEPS = 100
RIDE = {"type": "ride", "tokens": "all"}
RATES = (1e-3, 4e-3)
ARMS: dict[str, dict[str, Any]] = {
    "oprd": {"type": "oprd", "tokens": "all"},
    "ride 1.1": RIDE | {"extrapolation": 1.1},
    "ride 1.25": RIDE,
    "ride 1.5": RIDE | {"extrapolation": 1.5},
}


def tree(objective: dict[str, Any], rate: float, seed: int, out: Path, run: str) -> dict[str, Any]:
    return {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "objective": objective,
        "data": {"prompts": str(out / "train.jsonl")},
        "rollout": {"group_size": 2, "max_completion_length": 64, "engine": {"type": "hf", "cache_tokens": 131072}},
        "evaluation": evaluation_options(out / "held_out.jsonl"),
        "output_dir": str(out / run),
        "prompts_per_step": 32,
        "micro_batch_tokens": 2048,
        "max_steps": STEPS,
        "learning_rate": rate,
        "health_tokens": 0,
        "eval_steps": STEPS // 2,
        "save_steps": STEPS,
        "save_total_limit": 1,
        "seed": seed,
        "resume_from_checkpoint": "latest",
    }


def prepare(out: Path, result: Path) -> dict[str, Any]:
    """Writes the problems and returns what `result` holds so far; one thread, so that runs can be repeated exactly."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "train.jsonl", sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(out / "held_out.jsonl", sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    return json.loads(result.read_text()) if result.is_file() else {"rows": []}


def is_stored(stored: dict[str, Any], arm: str, seed: int) -> bool:
    return any(row["arm"] == arm and row["seed"] == seed for row in stored["rows"])


def store(result: Path, stored: dict[str, Any], **row: Any) -> None:
    stored["rows"].append(row)
    result.write_text(json.dumps(stored | {"machine": describe_machine()}, indent=1) + "\n")


def run_arms(out: Path, result: Path, runs: dict[str, tuple[dict[str, Any], float]]) -> None:
    """Every arm (objective, learning rate) with every seed; rows of finished ones are kept."""
    stored = prepare(out, result)
    for seed in SEEDS:
        for name, (objective, rate) in runs.items():
            if is_stored(stored, name, seed):
                continue
            run = f"{name.replace(' ', '-')}-{seed}"
            run_recipe(parse_recipe(tree(objective, rate, seed, out, run)))
            scores = {row["step"]: row["avg_at_k"] for row in read_jsonl(out / run / "evaluations.jsonl")}
            store(result, stored, arm=name, seed=seed, avg_at_4=scores, learning_rate=rate)


def table(result: Path) -> None:
    """Mean over seeds at each evaluated step, with the seeds' values at the last."""
    rows = json.loads(result.read_text())["rows"]
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [{int(step): x for step, x in row["avg_at_4"].items()} for row in rows if row["arm"] == name]
        means = "  ".join(f"{step}: {statistics.mean(o[step] for o in own):.3f}" for step in sorted(own[0]))
        print(f"{name:20} {means}  ({' '.join(f'{o[max(o)]:.3f}' for o in own)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    result = ROOT / "benchmarks" / "results" / "ride.json"
    if not parser.parse_args().table:
        runs = {f"{name} at {rate:g}": (objective, rate) for rate in RATES for name, objective in ARMS.items()}
        run_arms(ROOT / "runs" / "ride", result, runs)
    table(result)


if __name__ == "__main__":
    main()
