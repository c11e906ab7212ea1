"""A student and a teacher that end their texts with different tokens: what stopping at both ids is worth.

    python benchmarks/stops.py            # every arm, seeds 0, 1, 2; finished runs are kept in runs/stops
    python benchmarks/stops.py --table    # as in docs/algorithms.md

The miniature's base model without its chat template and with an end of text of its own, the miniature's teacher with `<|end|>`. 40
steps of 16 completions of at most 64 tokens. `both`: either token ends a completion and objectives on next tokens count them as one.
`own`: the student stops by its own alone, as before. Means over the last ten steps. Results: benchmarks/results/stops.json.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from oprd.demo.run import MODELS
from oprd.files import read_jsonl
from oprd.recipe import parse_recipe
from oprd.train import setup
from oprd.train.run import run_recipe
from ride import ROOT, SEEDS, is_stored, prepare, store

OUT = ROOT / "runs" / "stops"
RESULT = ROOT / "benchmarks" / "results" / "stops.json"
OWN_END = ("<|system|>", 258)
STEPS, LAST = 40, 10
OBJECTIVES: dict[str, tuple[dict[str, Any], float]] = {
    "opd": ({"type": "opd"}, 1e-3),
    "opd_sampled": ({"type": "opd_sampled"}, 8e-4),
    "oprd": ({"type": "oprd", "tokens": "all"}, 4e-3),
}
POLICIES = {"both": setup.pair_stops, "own": lambda student, teacher: ()}


def write_student(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "base")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    tokenizer.chat_template, tokenizer.eos_token = None, OWN_END[0]
    model.config.eos_token_id, model.generation_config = OWN_END[1], GenerationConfig(eos_token_id=OWN_END[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tree(objective: dict[str, Any], rate: float, seed: int, run: str) -> dict[str, Any]:
    return {
        "student": {"model": str(OUT / "student")},
        "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "objective": objective,
        "data": {"prompts": str(OUT / "train.jsonl")},
        "rollout": {"group_size": 2, "max_completion_length": 64},
        "output_dir": str(OUT / run),
        "prompts_per_step": 8,
        "max_steps": STEPS,
        "learning_rate": rate,
        "health_tokens": 0,
        "save_steps": STEPS,
        "save_total_limit": 1,
        "seed": seed,
        "resume_from_checkpoint": "latest",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        stored = prepare(OUT, RESULT)
        write_student(OUT / "student")
        for seed, name, policy in itertools.product(SEEDS, OBJECTIVES, POLICIES):
            arm = f"{name}, {policy}"
            if is_stored(stored, arm, seed):
                continue
            setup.pair_stops = POLICIES[policy]
            objective, rate = OBJECTIVES[name]
            run = f"{name}-{policy}-{seed}"
            run_recipe(parse_recipe(tree(objective, rate, seed, run)))
            rows = read_jsonl(OUT / run / "metrics.jsonl")[-LAST:]
            cut, length = (
                statistics.mean(row[key] for row in rows) for key in ("rollout/truncated/share", "rollout/length/mean")
            )
            store(RESULT, stored, arm=arm, seed=seed, finished=1 - cut, length=length, learning_rate=rate)
    rows = json.loads(RESULT.read_text())["rows"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        finished, length = (statistics.mean(row[key] for row in own) for key in ("finished", "length"))
        each = " ".join(f"{row['finished']:.2f}" for row in own)
        print(f"{arm:18} finished {finished:.2f} ({each}), mean length {length:.1f}")


if __name__ == "__main__":
    main()
