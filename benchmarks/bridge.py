"""OPRD-Bridge from the miniature base to `wide_teacher`: other width, other depth, other tokenizer.

    python benchmarks/bridge.py                  # every arm, seeds 0, 1, 2; finished ones are kept
    python benchmarks/bridge.py auto opd --seeds 0
    python benchmarks/bridge.py --table          # the results, as in docs/bridge.md

Each arm is a recipe of 200 steps of 64 completions; runs, bridges and scores are in runs/bridge, the table in
benchmarks/results/bridge.json. All arms have the same seeds, prompts and evaluation; learning rates were tuned on seed 0.

The results hold arms of options that are gone: `*_not_sharpened`, `shared_ids`, `published_shared_ids`, `no_features`,
`all_rows`, `gradient`, `published_last_block_trainable*`, `published_last_block_refit_50*`. They were made at 7ba54df; the
gradient fit itself is in `bridge_fit.py`. At 7ba54df `full_then_opd` was one run in two stages.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS, TRAINING_PROBLEMS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.evaluate.benchmarks import EvaluationConfig
from oprd.evaluate.evaluate import Evaluation, evaluate_model
from oprd.files import read_jsonl
from oprd.recipe import parse_recipe
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "bridge"
RESULT = ROOT / "benchmarks" / "results" / "bridge.json"
SEEDS = (0, 1, 2)
LEARNING_RATE = 2e-3
FIT_PROMPTS = 1024
STAGES = (150, 50)
"""Steps of an arm that goes on with OPD: of the bridge, of OPD."""
OPD = {"type": "opd_sampled"}
PUBLISHED = {"type": "oprd_bridge_published", "rank": "auto"}
LAST_BLOCK = PUBLISHED | {"layers": "last"}
THROUGH_HEAD = {"loss": "reverse_kl", "weight": 1.0}

Arm = dict[str, Any]
"""What an arm changes: `bridge` (keys of the objective), `learning_rate`, `opd` (it goes on with OPD, or is OPD), `updates`
(with each rollout; sampled OPD across tokenizers has one), `twin` (OPRD to a teacher of the student's shape and tokenizer:
the control for what is lost across the bridge)."""

ARMS: dict[str, Arm] = {
    "full": {"bridge": {"rank": "full"}},
    "auto": {"bridge": {"rank": "auto"}},
    **{
        f"{rank}_reverse_kl": {"bridge": {"rank": rank} | THROUGH_HEAD, "learning_rate": 8e-4}
        for rank in ("full", "auto")
    },
    **{
        f"auto_reverse_kl_{rate}": {"bridge": {"rank": "auto"} | THROUGH_HEAD, "learning_rate": float(rate)}
        for rate in ("4e-4", "1.6e-3")
    },
    "opd": {"opd": True, "learning_rate": 4e-4},
    "full_then_opd": {"bridge": {"rank": "full"}, "opd": True, "learning_rate": 4e-4},
    "published": {"bridge": PUBLISHED, "learning_rate": 1e-3},
    **{f"rank_{r}": {"bridge": {"rank": r}} for r in (2, 4, 8, 16, 32)},
    "all_blocks": {"bridge": {"rank": "full", "layers": "all"}},
    **{f"published_rank_{r}": {"bridge": PUBLISHED | {"rank": r}, "learning_rate": 1e-3} for r in (8, 32, 128)},
    "published_3e-4": {"bridge": PUBLISHED, "learning_rate": 3e-4},
    "published_last_block": {"bridge": LAST_BLOCK, "learning_rate": 1e-3},
    "published_last_block_1e-4": {"bridge": LAST_BLOCK, "learning_rate": 1e-4},
    "full_1e-3": {"bridge": {"rank": "full"}, "learning_rate": 1e-3},
    "full_4e-3": {"bridge": {"rank": "full"}, "learning_rate": 4e-3},
    "twin_all_blocks": {"twin": {}},
    "twin_last_block": {"twin": {"layers": "last"}},
    "auto_3_updates": {"bridge": {"rank": "auto"}, "updates": 3},
    "full_3_updates": {"bridge": {"rank": "full"}, "updates": 3},
    "opd_2e-4": {"opd": True, "learning_rate": 2e-4},
    "opd_8e-4": {"opd": True, "learning_rate": 8e-4},
}


def recipe_tree(name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """The arm as a recipe; one bridge for each form, choice of blocks and seed."""
    tree = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"},
        "data": {"prompts": str(OUT / "train.jsonl")},
        "rollout": {"group_size": 2, "max_completion_length": 80, "updates_per_rollout": arm.get("updates", 1)},
        "evaluation": evaluation_options(OUT / "held_out.jsonl"),
        "output_dir": str(OUT / f"{name}-{seed}"),
        "prompts_per_step": 32,
        "max_steps": sum(STAGES),
        "learning_rate": arm.get("learning_rate", LEARNING_RATE),
        "health_tokens": 128,
        "save_steps": 50,
        "save_total_limit": 1,
        "seed": seed,
        "resume_from_checkpoint": "latest",
    }
    if "twin" in arm:
        teacher = tree["teacher"] | {"model": str(MODELS / "teacher")}
        return tree | {"teacher": teacher, "objective": {"type": "oprd", "tokens": "all"} | arm["twin"]}
    if "bridge" not in arm:
        return tree | {"objective": OPD}
    objective = {"type": "oprd_bridge", "tokens": "all", "fit_prompts": FIT_PROMPTS} | arm["bridge"]
    layers = objective.get("layers", "all" if objective["type"] == "oprd_bridge_published" else "last")
    file = OUT / "bridges" / f"{objective['type']}-{layers}-{seed}.safetensors"
    return tree | {"objective": objective | {"bridge": str(file)}}


def runs_of(name: str, arm: Arm, seed: int) -> list[dict[str, Any]]:
    """The arm's recipe, or two of them where it goes on with OPD."""
    tree = recipe_tree(name, arm, seed)
    if not ("bridge" in arm and "opd" in arm):
        return [tree]
    folder, (steps, opd_steps) = f"{tree['output_dir']}-bridge", STAGES
    changes = {"evaluation": {}, "learning_rate": LEARNING_RATE, "max_steps": steps, "output_dir": folder}
    return [
        tree | changes,
        tree | {"student": {"model": f"{folder}/student"}, "objective": OPD, "max_steps": opd_steps},
    ]


def run_arm(name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Fit if there is no bridge yet, train, score; what was done before is read."""
    trees = runs_of(name, arm, seed)
    if "bridge" in arm and not Path(trees[0]["objective"]["bridge"]).exists():
        fit_bridge(parse_recipe(trees[0]))
    results = [run_recipe(parse_recipe(tree)).result for tree in trees]
    metrics = [row for tree in trees for row in read_jsonl(Path(tree["output_dir"]) / "metrics.jsonl")]
    aligned = [row["teacher/aligned/share"] for row in metrics if "teacher/aligned/share" in row]
    return {
        "arm": name,
        "seed": seed,
        "learning_rate": trees[-1]["learning_rate"],
        "seconds": round(sum(result.seconds for result in results), 1),
        "paired_share": round(sum(aligned) / len(aligned), 3) if aligned else None,
        **scores(results[-1].evaluations[0]),
    }


def score_model(name: str) -> dict[str, Any]:
    out = OUT / f"score-{name}"
    known = read_jsonl(out / "evaluations.jsonl")
    config = EvaluationConfig.model_validate(evaluation_options(OUT / "held_out.jsonl"))
    evaluation = Evaluation.from_row(known[0]) if known else evaluate_model(str(MODELS / name), config, out=out)[0]
    return {"arm": name, "seed": None, **scores(evaluation)}


def scores(evaluation: Evaluation) -> dict[str, float]:
    keys = ("avg_at_k", "avg_at_k_low", "avg_at_k_high", "best_at_k", "distinct_4", "mean_length", "truncated_share")
    return {key: round(dataclasses.asdict(evaluation)[key], 4) for key in keys}


def write_problems() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUT / "train.jsonl", sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(OUT / "held_out.jsonl", sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="OPRD-Bridge across width, depth and tokenizer, on the miniature.")
    parser.add_argument("arms", nargs="*", help="all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and do nothing else")
    given = parser.parse_args()
    if given.table:
        print(table(given.arms or [*ARMS, *(arm for arm, _ in read_rows())]))
        return
    torch.set_num_threads(1)
    write_problems()
    for model in ("base", "wide_teacher"):
        if (model, None) not in read_rows():
            add_row(score_model(model))
    for seed in given.seeds:
        for name in given.arms or ARMS:
            if (name, seed) not in read_rows():
                add_row(run_arm(name, ARMS[name], seed))


def table(arms: Iterable[str]) -> str:
    """Mean over seeds, and avg@4 of every seed."""
    rows = read_rows()
    lines = ["| | avg@4 | of seeds | best@4 | distinct 4-grams | mean length |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(("base", "wide_teacher", *arms)):
        found = [rows[name, seed] for seed in (None, *SEEDS) if (name, seed) in rows]
        if not found:
            continue
        seeds = ", ".join(f"{row['avg_at_k']:.3f}" for row in found if row["seed"] is not None)
        avg, best, distinct, length = (
            statistics.mean(row[key] for row in found) for key in ("avg_at_k", "best_at_k", "distinct_4", "mean_length")
        )
        lines.append(f"| `{name}` | {avg:.3f} | {seeds} | {best:.3f} | {distinct:.3f} | {length:.1f} |")
    return "\n".join(lines)


def read_rows() -> dict[tuple[str, int | None], dict[str, Any]]:
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    return {(row["arm"], row["seed"]): row for row in rows}


def add_row(row: dict[str, Any]) -> None:
    """Add to the file as it is now: several of these commands may run at once, a seed each."""
    rows = read_rows() | {(row["arm"], row["seed"]): row}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"rows": list(rows.values()), **describe_machine()}, indent=1) + "\n")
    print({key: row[key] for key in ("arm", "seed", "avg_at_k", "best_at_k", "mean_length")}, flush=True)


if __name__ == "__main__":
    main()
