"""What extrapolation and cheaper rollouts save on the miniature: `python benchmarks/effopd.py ARM ...`.

An arm is a recipe: objective, learning rate, completions a step, variant, seed. Each is trained with a constant learning
rate and scored on 200 held-out problems (2 samples each, temperature 1) on the way. Seconds of training are CPU seconds of
the steps on one thread, searches and their judging included, evaluations not. Finished arms are kept in
benchmarks/results/effopd.json; an interrupted one resumes from its checkpoint.

Arms of the variant `settled` in the results were made at 7ba54df: that trigger is gone.
"""

import fcntl
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from chart import COLOURS, Chart, write_charts
from oprd import clock
from oprd.demo.run import MODELS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.files import read_jsonl, write_atomically
from oprd.recipe import Recipe, parse_recipe
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "effopd"
RESULTS = ROOT / "benchmarks" / "results" / "effopd.json"
STEPS, EVERY = 100, 10
PLAIN_STEPS = {"1e-4": 160, "5e-5": 160, "2.5e-5": 240, "1.25e-5": 240}
"""Of plain runs at a learning rate at which 100 steps lead nowhere."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "oprd": {"type": "oprd", "tokens": "all"},
    "kl": {"type": "opd"},
    "sampled": {"type": "opd_sampled"},
}
BY_OBJECTIVE: dict[str, Any] = {"score": "objective", "accept": "paired"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    # searches: as published, and with what is ours
    "paper": {"extrapolation": {}},
    "strict": {"extrapolation": {"accept": "better"}},
    "paired": {"extrapolation": {"accept": "paired"}},
    "objective": {"extrapolation": BY_OBJECTIVE},
    "averaged": {"extrapolation": {"score": "objective", "factors": [1.0, 2.0, 4.0, 8.0], "every": 16}},
    "small": {
        "extrapolation": BY_OBJECTIVE | {"validation_prompts": 16, "factors": [0.5, 1.0, 2.0, 4.0, 8.0], "every": 8}
    },
    # rollouts: a quarter of the length throughout, and growing to the whole
    "short16": {"rollout": {"max_completion_length": 16}},
    "growing": {"rollout": {"length_schedule": {"from": 8, "steps": 80}}},
    # as many tokens supervised as in short16, behind whole rollouts
    "first16": {"objective": {"tokens": {"first": 16}}},
    # four updates with each rollout
    "stale4": {"rollout": {"updates_per_rollout": 4}},
    # of 4,000 prompts the first
    "one_prompt": {"data": {"limit": 1}},
    "prompts16": {"data": {"limit": 16}},
    "prompts256": {"data": {"limit": 256}},
}
SEARCHES = ("plain", "paper", "small", "averaged")
SCHEDULES = ("plain", "short16", "growing", "first16", "stale4", "one_prompt")
BEST_RATE = ("oprd-4e-3-64", "kl-4e-4-64", "sampled-4e-4-64")
FIGURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fewer_steps.svg": (("oprd-2.5e-5-64", "kl-1.25e-5-64", "sampled-1.25e-5-64"), SEARCHES),
    "fewer_steps_best_rate.svg": (BEST_RATE, SEARCHES),
    "rollout_schedules.svg": (BEST_RATE, SCHEDULES),
}
"""Settings and variants drawn in docs/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run. Its name is its parts joined by dashes: `oprd-1e-4-64-plain-0`."""

    objective: str
    learning_rate: str
    completions: int
    """A step, two of each prompt."""
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.learning_rate}-{self.completions}-{self.variant}-{self.seed}"


def arm_of(name: str) -> Arm:
    objective, rest = name.split("-", 1)
    rate, completions, variant, seed = rest.rsplit("-", 3)
    return Arm(objective=objective, learning_rate=rate, completions=int(completions), variant=variant, seed=int(seed))


def recipe_of(arm: Arm, train: Path, held_out: Path) -> Recipe:
    changes = VARIANTS[arm.variant]
    steps = PLAIN_STEPS.get(arm.learning_rate, STEPS) if arm.variant == "plain" else STEPS
    tree: dict[str, Any] = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "objective": OBJECTIVES[arm.objective],
        "data": {"prompts": str(train)},
        "rollout": {"group_size": 2, "max_completion_length": 80, "engine": {"type": "hf", "cache_tokens": 131072}},
        "evaluation": evaluation_options(held_out) | {"samples": 2},
        "output_dir": str(RUNS / arm.name),
        "prompts_per_step": arm.completions // 2,
        "max_steps": steps,
        "eval_steps": max(EVERY, steps // 12),
        "learning_rate": float(arm.learning_rate),
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "health_tokens": 0,
        "save_steps": 8,
        "save_total_limit": 100,
        "seed": arm.seed,
        "resume_from_checkpoint": "latest",
    }
    return parse_recipe(tree | {key: tree.get(key, {}) | change for key, change in changes.items()})


def measure(folder: Path) -> dict[str, Any]:
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
        "search_seconds": round(sum(row.get("time/extrapolation_s/sum", 0.0) for row in rows), 1),
        "searches": read_jsonl(folder / "searches.jsonl"),
    }


def curve(arms: list[dict[str, Any]], against: str) -> tuple[list[float], list[float]]:
    """Means over seeds: (`against`, accuracy)."""
    steps = [step for step in arms[0]["step"] if all(step in arm["step"] for arm in arms)]
    at = [[arm["step"].index(step) for step in steps] for arm in arms]
    x, y = (
        [sum(arm[key][i] for arm, i in zip(arms, row, strict=True)) / len(arms) for row in zip(*at, strict=True)]
        for key in (against, "accuracy")
    )
    return x, y


def first_reaching(x: list[float], y: list[float], level: float) -> float | None:
    """Where linear interpolation between the points first reaches `level`; None if it never does."""
    for (x0, y0), (x1, y1) in pairwise(zip(x, y, strict=True)):
        if y0 < level <= y1:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def summarize(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By setting and variant: final accuracy, and where 90% of the plain runs' gain is reached, on the mean over seeds."""
    by_setting: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, arm in sorted(arms.items()):
        parts = arm_of(name)
        setting = f"{parts.objective}-{parts.learning_rate}-{parts.completions}"
        by_setting.setdefault(setting, {}).setdefault(parts.variant, []).append(arm | {"seed": parts.seed})
    table: dict[str, Any] = {}
    for setting, variants in by_setting.items():
        if "plain" not in variants:
            continue
        level = most_of_the_gain(variants["plain"])
        table[setting] = {"level": round(level, 4)} | {
            variant: {
                "seeds": len(found),
                "final_accuracy": round(curve(found, "step")[1][-1], 4),
                "final_of_seeds": [arm["accuracy"][-1] for arm in found],
                "search_seconds": round(sum(a["search_seconds"] for a in found) / len(found), 1),
                "seconds": round(curve(found, "seconds")[0][-1], 1),
                **{
                    f"{against}_to_90": rounded(first_reaching(*curve(found, against), level))
                    for against in ("step", "seconds", "generated_tokens")
                },
                "steps_to_90_of_seeds": {
                    arm["seed"]: rounded(first_reaching(*curve([arm], "step"), most_of_the_gain([plain])))
                    for arm in found
                    for plain in variants["plain"]
                    if plain["seed"] == arm["seed"]
                },
            }
            for variant, found in variants.items()
        }
    return table


def most_of_the_gain(plain: list[dict[str, Any]]) -> float:
    """The accuracy at which 90% of the plain runs' gain is reached."""
    _, accuracy = curve(plain, "step")
    return accuracy[0] + 0.9 * (accuracy[-1] - accuracy[0])


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that judge answers: the machine is shared, so wall time would say little."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def draw(arms: dict[str, dict[str, Any]], settings: Sequence[str], variants: Sequence[str], out: Path) -> None:
    """Accuracy against steps, seconds and generated tokens, mean over seeds: a row for each setting."""
    rows = []
    for setting in settings:
        found = {v: [arm for name, arm in arms.items() if name.startswith(f"{setting}-{v}-")] for v in variants}
        named = {f"{variant} ({len(runs)})": runs for variant, runs in found.items() if runs}
        if not named:
            continue
        colours = {name: COLOURS[variants.index(name.rsplit(" ", 1)[0])] for name in named}
        row = []
        for against in ("step", "seconds", "generated_tokens"):
            lines = {name: curve(runs, against) for name, runs in named.items()}
            low = math.floor(10 * min(min(y) for _, y in lines.values())) / 10
            high = math.ceil(10 * max(max(y) for _, y in lines.values())) / 10
            label = against.replace("_", " ")
            row.append(Chart(title=setting, x_label=label, lines=lines, colours=colours, low=low, high=high))
        rows.append(row)
    if rows:
        write_charts(rows, out)


@contextmanager
def alone() -> Iterator[None]:
    """Lock of the files that arms share: several may run at once."""
    with (RUNS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(name: str, arm: dict[str, Any]) -> None:
    """Add the arm to the results and draw the figures again."""
    with alone():
        arms = finished() | {name: arm}
        table = {"summary": summarize(arms), "arms": arms, "machine": describe_machine()}
        write_atomically(RESULTS, json.dumps(table) + "\n")
        for figure, (settings, variants) in FIGURES.items():
            draw(arms, settings, variants, ROOT / "docs" / figure)


def finished() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text())["arms"] if RESULTS.is_file() else {}


def main(names: list[str]) -> None:
    if not names:
        sys.exit(f"name at least one arm, such as oprd-1e-4-64-plain-0; variants: {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    clock.time = SimpleNamespace(perf_counter=cpu_seconds)
    RUNS.mkdir(parents=True, exist_ok=True)
    train, held_out = RUNS / "train.jsonl", RUNS / "held_out.jsonl"
    with alone():
        if not (train.is_file() and held_out.is_file()):
            write_jsonl(train, sums(4000, seed=1, held_out=False))
            write_jsonl(held_out, sums(200, seed=2, held_out=True))
    for name in names:
        if name not in finished():
            done = run_recipe(recipe_of(arm_of(name), train, held_out))
            arm = measure(done.run_folder)
            keep(name, arm)
            print(name, list(zip(arm["step"], arm["accuracy"], strict=True)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
