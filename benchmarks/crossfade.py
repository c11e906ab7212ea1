"""A latent term that fades into a token term in one optimizer, against each alone and against a hard switch.

    python benchmarks/crossfade.py            # every arm, seeds 0, 1, 2; finished runs are kept in runs/crossfade
    python benchmarks/crossfade.py --table    # means and seeds, as in docs/algorithms.md

From the miniature's base model to `wide_teacher` (other width, depth and tokenizer): OPRD-Bridge on the last block and sampled
OPD. 100 steps of 64 completions at a constant learning rate, one of two, evaluated on 200 held-out problems, 4 samples each, after 50
and 100 steps. `fade n`: the bridge's weight goes from 10 to 0 and OPD's from 0 to 1 in n steps. `switch n`: n steps of the bridge,
then a second recipe with OPD alone from its student. Results: benchmarks/results/crossfade.json.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from oprd.demo.run import MODELS
from oprd.files import read_jsonl
from oprd.recipe import parse_recipe
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run import run_recipe
from ride import ROOT, SEEDS, STEPS, is_stored, prepare, store, table, tree

OUT = ROOT / "runs" / "crossfade"
RESULT = ROOT / "benchmarks" / "results" / "crossfade.json"
RATES = (2e-4, 8e-4)
ARMS = ("bridge", "opd", "switch 10", "fade 10", "fade 50")
OPD = {"type": "opd_sampled"}


def bridge(seed: int) -> dict[str, Any]:
    return {
        "type": "oprd_bridge",
        "bridge": str(OUT / f"bridge-{seed}.safetensors"),
        "tokens": "all",
        "fit_prompts": 1024,
    }


def faded(seed: int, steps: int) -> list[dict[str, Any]]:
    return [
        bridge(seed) | {"weight": {"from": 10.0, "to": 0.0, "steps": steps}},
        OPD | {"weight": {"from": 0.0, "to": 1.0, "steps": steps}},
    ]


def recipe(objective: Any, rate: float, seed: int, run: str, **changes: Any) -> dict[str, Any]:
    base = tree(objective, rate, seed, OUT, run) | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    teacher = base["teacher"] | {"model": str(MODELS / "wide_teacher")}
    rollout = base["rollout"] | {"max_completion_length": 80}
    return base | {"teacher": teacher, "rollout": rollout} | changes


def run_arm(name: str, rate: float, seed: int) -> dict[int, float]:
    """avg@4 by step."""
    kind, _, steps = name.partition(" ")
    run = f"{name.replace(' ', '-')}-at-{rate:g}-{seed}"
    if kind == "switch":
        first = recipe(bridge(seed), rate, seed, f"{run}-first", max_steps=int(steps), eval_steps=int(steps))
        run_recipe(parse_recipe(first))
        student = {"model": str(OUT / f"{run}-first" / "student")}
        rest = {"max_steps": STEPS - int(steps), "eval_steps": STEPS // 2 - int(steps) or STEPS}
        run_recipe(parse_recipe(recipe(OPD, rate, seed + 100, run, student=student, **rest)))
        rows = read_jsonl(OUT / run / "evaluations.jsonl")
        scores = {row["step"] + int(steps): row["avg_at_k"] for row in rows}
        return {step: x for step, x in scores.items() if step in (STEPS // 2, STEPS)}
    objective: Any = {"bridge": bridge(seed), "opd": OPD}.get(kind) or faded(seed, int(steps))
    run_recipe(parse_recipe(recipe(objective, rate, seed, run)))
    return {row["step"]: row["avg_at_k"] for row in read_jsonl(OUT / run / "evaluations.jsonl") if row["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        stored = prepare(OUT, RESULT)
        for seed in SEEDS:
            if not Path(bridge(seed)["bridge"]).is_file():
                fit_bridge(parse_recipe(recipe(bridge(seed), RATES[0], seed, f"fit-{seed}")))
            for name, rate in itertools.product(ARMS, RATES):
                arm = f"{name} at {rate:g}"
                if not is_stored(stored, arm, seed):
                    store(RESULT, stored, arm=arm, seed=seed, avg_at_4=run_arm(name, rate, seed), learning_rate=rate)
    table(RESULT)


if __name__ == "__main__":
    main()
