"""What extrapolation saves, arm by arm on the miniature: `python benchmarks/effopd.py [ARM ...]` (all missing ones by default).

An arm is a recipe: objective, learning rate, completions a step, search, seed. Each is trained with a constant learning
rate and scored on 200 held-out problems (2 samples each, temperature 1) on the way; the seconds of training are CPU seconds
of the steps on one thread, searches included, evaluations not. Finished arms are kept in benchmarks/results/effopd.json; an interrupted one goes
on from its checkpoint.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from oprd.config import Recipe, parse_recipe
from oprd.demo.run import MODELS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.train import log
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine, read_jsonl

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "effopd"
RESULTS = ROOT / "benchmarks" / "results" / "effopd.json"
STEPS, EVERY = 100, 10
OBJECTIVES: dict[str, dict[str, Any]] = {
    "oprd": {"type": "oprd", "tokens": "all"},
    "kl": {"type": "opd"},
    "sampled": {"type": "opd", "estimator": "sampled"},
}
SEARCHES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "paper": {"type": "effopd"},
    "objective": {"type": "effopd", "score": "objective", "accept": "paired"},
    "small": {
        "type": "effopd",
        "score": "objective",
        "accept": "paired",
        "validation_prompts": 16,
        "factors": [0.5, 1.0, 2.0, 4.0, 8.0],
        "triggers": "every_n",
        "every": 8,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run. Its name is its parts joined by dashes: `oprd-1e-4-64-plain-0`."""

    objective: str
    learning_rate: str
    completions: int
    """A step, two of each prompt."""
    search: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.learning_rate}-{self.completions}-{self.search}-{self.seed}"


def arm_of(name: str) -> Arm:
    objective, rest = name.split("-", 1)
    rate, completions, search, seed = rest.rsplit("-", 3)
    return Arm(objective=objective, learning_rate=rate, completions=int(completions), search=search, seed=int(seed))


def recipe_of(arm: Arm, train: Path, held_out: Path) -> Recipe:
    search = SEARCHES[arm.search]
    tree = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "objective": OBJECTIVES[arm.objective],
        "data": {"prompts": str(train)},
        "rollout": {"group_size": 2, "max_completion_length": 80, "max_sequences": arm.completions},
        "evaluation": evaluation_options(held_out) | {"samples": 2, "max_sequences": 400},
        "output_dir": str(RUNS / arm.name),
        "prompts_per_step": arm.completions // 2,
        "max_steps": STEPS,
        "eval_steps": EVERY,
        "learning_rate": float(arm.learning_rate),
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "health_tokens": 0,
        "save_steps": 16,
        "save_total_limit": 100,
        "seed": arm.seed,
        "resume_from_checkpoint": "latest",
    }
    return parse_recipe(tree | ({} if search is None else {"extrapolation": search}))


def measure(arm: Arm, folder: Path) -> dict[str, Any]:
    """Accuracy against steps, seconds of training and generated tokens."""
    rows = read_jsonl(folder / "metrics.jsonl")
    seconds, tokens = [0.0], [0]
    for row in rows:
        seconds.append(seconds[-1] + sum(value for key, value in row.items() if key.startswith("time/")))
        tokens.append(tokens[-1] + row["tokens/generated/sum"] + row.get("tokens/extrapolation/sum", 0))
    points = read_jsonl(folder / "evaluations.jsonl")
    return {
        "step": [point["step"] for point in points],
        "accuracy": [round(point["avg_at_k"], 4) for point in points],
        "seconds": [round(seconds[point["step"]], 1) for point in points],
        "generated_tokens": [tokens[point["step"]] for point in points],
        "searches": read_jsonl(folder / "searches.jsonl"),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    # the machine is shared: the CPU seconds of this one thread are what the wall would show were it alone
    log.time = SimpleNamespace(perf_counter=time.process_time)
    RUNS.mkdir(parents=True, exist_ok=True)
    train, held_out = RUNS / "train.jsonl", RUNS / "held_out.jsonl"
    write_jsonl(train, sums(4000, seed=1, held_out=False))
    write_jsonl(held_out, sums(200, seed=2, held_out=True))
    for name in names:
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"arms": {}}
        if name in known["arms"]:
            continue
        arm = arm_of(name)
        done = run_recipe(recipe_of(arm, train, held_out))
        # read again: arms may run side by side
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"arms": {}}
        known["arms"][name] = measure(arm, done.run_folder)
        RESULTS.write_text(json.dumps(known | {"machine": describe_machine()}, indent=None) + "\n")
        print(name, list(zip(known["arms"][name]["step"], known["arms"][name]["accuracy"], strict=True)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
