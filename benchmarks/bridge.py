"""OPRD-Bridge from the miniature base to `wide_teacher`: other width, other depth, other tokenizer.

    python benchmarks/bridge.py                  # every arm, seeds 0, 1, 2; finished ones are kept
    python benchmarks/bridge.py auto shared_ids --seeds 0
    python benchmarks/bridge.py --table          # what is measured, as in docs/bridge.md

Each arm is a recipe of 200 steps of 64 completions; runs, bridges and scores are under runs/bridge, the table in
benchmarks/results/bridge.json. All arms have the same seeds, prompts and evaluation; learning rates are those of ARMS,
tuned on seed 0.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from oprd.config.reading import parse_recipe
from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS, TRAINING_PROBLEMS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.evaluate.command import evaluate_model
from oprd.evaluate.run import Evaluation, evaluation_from
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine, read_jsonl

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "bridge"
RESULT = ROOT / "benchmarks" / "results" / "bridge.json"
SEEDS = (0, 1, 2)
LEARNING_RATE = 2e-3
FIT_PROMPTS = 1024
OPD = {"type": "opd", "estimator": "sampled"}
AS_PUBLISHED = {"limit": FIT_PROMPTS, "features": 0, "confidence": 0.0}
PUBLISHED = {"space": "projections", "layers": "all", "rank": "auto", "fit": AS_PUBLISHED}
LAST_BLOCK = PUBLISHED | {"layers": "last"}

Arm = dict[str, Any]
"""What an arm changes: `bridge` (keys of the objective), `alignment`, `learning_rate`; `opd`: it ends in OPD, or is OPD;
`updates`: so many with each rollout, which sampled OPD across tokenizers cannot have; `twin`: vanilla OPRD to a teacher of
the student's shape and tokenizer, the control for what is lost across the bridge."""

NOT_SHARPENED = {"sharpen": False}
THROUGH_HEAD = {"loss": "reverse_kl", "coefficient": 1.0}
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
    "shared_ids": {"bridge": {"rank": "full"}, "alignment": "shared_ids"},
    "published": {"bridge": PUBLISHED, "learning_rate": 1e-3},
    "published_shared_ids": {"bridge": PUBLISHED, "alignment": "shared_ids", "learning_rate": 1e-3},
    **{f"rank_{r}": {"bridge": {"rank": r}} for r in (2, 4, 8, 16, 32)},
    "no_features": {"bridge": {"rank": "full", "fit": {"limit": FIT_PROMPTS, "features": 0}}},
    "all_rows": {"bridge": {"rank": "full", "fit": {"limit": FIT_PROMPTS, "confidence": 0.0}}},
    "all_blocks": {"bridge": {"rank": "full", "layers": "all"}},
    "gradient": {
        "bridge": PUBLISHED | {"fit": AS_PUBLISHED | {"method": "gradient"}},
        "learning_rate": 1e-3,
    },
    **{f"published_rank_{r}": {"bridge": PUBLISHED | {"rank": r}, "learning_rate": 1e-3} for r in (8, 32, 128)},
    "published_3e-4": {"bridge": PUBLISHED, "learning_rate": 3e-4},
    **{
        f"published_last_block{name}{rate}": {"bridge": LAST_BLOCK | change, "learning_rate": float(rate[1:] or 1e-3)}
        for name, change in (("", {}), ("_trainable", {"trainable": True}), ("_refit_50", {"refit_every": 50}))
        for rate in ("", "_1e-4")
    },
    "full_1e-3": {"bridge": {"rank": "full"}, "learning_rate": 1e-3},
    "full_4e-3": {"bridge": {"rank": "full"}, "learning_rate": 4e-3},
    "twin_all_blocks": {"twin": {}},
    "twin_last_block": {"twin": {"layers": "last"}},
    "auto_3_updates": {"bridge": {"rank": "auto"}, "updates": 3},
    "full_3_updates": {"bridge": {"rank": "full"}, "updates": 3},
    "opd_2e-4": {"opd": True, "learning_rate": 2e-4},
    "opd_8e-4": {"opd": True, "learning_rate": 8e-4},
}
ARMS |= {
    f"{name}_not_sharpened": ARMS[name] | {"bridge": ARMS[name]["bridge"] | NOT_SHARPENED}
    for name in (
        "full",
        "auto",
        "auto_reverse_kl",
        *(f"rank_{r}" for r in (2, 4, 8, 16, 32)),
        "full_then_opd",
        "shared_ids",
        "all_blocks",
    )
}


def recipe_tree(name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """The arm as a recipe; the bridge is one for each fit and seed."""
    alignment = arm.get("alignment", "bytes")
    bridge = arm.get("bridge", {})
    fit = bridge.get("fit", {"limit": FIT_PROMPTS})
    kind = "-".join(
        [
            fit.get("method", "closed_form"),
            alignment,
            bridge.get("layers", "last"),
            str(fit.get("features", 512)),
            str(fit.get("confidence", 0.9)),
        ]
    )
    objective = {
        "type": "oprd_bridge",
        "bridge": str(OUT / "bridges" / f"{kind}-{seed}.safetensors"),
        "tokens": "all",
        "fit": fit,
    } | bridge
    tree = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {
            "type": "local",
            "model": str(MODELS / "wide_teacher"),
            "dtype": "float32",
            "alignment": alignment,
        },
        "data": {"prompts": str(OUT / "train.jsonl")},
        "rollout": {
            "group_size": 2,
            "max_completion_length": 80,
            "updates_per_rollout": arm.get("updates", 1),
        },
        "evaluation": evaluation_options(OUT / "held_out.jsonl"),
        "output_dir": str(OUT / f"{name}-{seed}"),
        "prompts_per_step": 32,
        "max_steps": 200,
        "learning_rate": arm.get("learning_rate", LEARNING_RATE),
        "health_tokens": 128,
        "save_steps": 50,
        "save_total_limit": 1,
        "seed": seed,
        "resume_from_checkpoint": "latest",
    }
    if "twin" in arm:
        return tree | {
            "teacher": tree["teacher"] | {"model": str(MODELS / "teacher"), "alignment": "bytes"},
            "objective": {"type": "oprd", "tokens": "all"} | arm["twin"],
        }
    if not bridge:
        return tree | {"objective": OPD}
    if not arm.get("opd"):
        return tree | {"objective": objective}
    del tree["max_steps"]
    stages = [
        {"objective": objective, "max_steps": 150, "learning_rate": LEARNING_RATE},
        {"objective": OPD, "max_steps": 50},
    ]
    return tree | {"stages": stages}


def run_arm(name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Fit if there is no bridge yet, train, score; what is done already is read."""
    tree = recipe_tree(name, arm, seed)
    if arm.get("bridge"):
        objective = tree["objective"] if "objective" in tree else tree["stages"][0]["objective"]
        if not Path(objective["bridge"]).exists():
            fit_bridge(parse_recipe(tree))
    done = run_recipe(parse_recipe(tree))
    metrics = read_jsonl(Path(tree["output_dir"]) / "metrics.jsonl")
    paired = [row["teacher/paired/share"] for row in metrics if "teacher/paired/share" in row]
    return {
        "arm": name,
        "seed": seed,
        "learning_rate": tree["learning_rate"],
        "seconds": done.result.seconds,
        "paired_share": round(sum(paired) / len(paired), 3) if paired else None,
        **scores(done.result.evaluations[0]),
    }


def score_model(name: str) -> dict[str, Any]:
    out = OUT / f"score-{name}"
    known = read_jsonl(out / "evaluations.jsonl")
    options = evaluation_options(OUT / "held_out.jsonl")
    evaluation = evaluation_from(known[0]) if known else evaluate_model(str(MODELS / name), options, out=out)[0]
    return {"arm": name, "seed": None, **scores(evaluation)}


def scores(evaluation: Evaluation) -> dict[str, float]:
    keys = ("avg_at_k", "avg_at_k_low", "avg_at_k_high", "best_at_k", "distinct_4", "mean_length", "truncated_share")
    return {key: round(dataclasses.asdict(evaluation)[key], 4) for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description="OPRD-Bridge across width, depth and tokenizer, on the miniature.")
    parser.add_argument("arms", nargs="*", help="all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and do nothing else")
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.arms or ARMS))
        return
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUT / "train.jsonl", sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(OUT / "held_out.jsonl", sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    for model in ("base", "wide_teacher"):
        if (model, None) not in read_rows():
            add_row(score_model(model))
    for seed in asked.seeds:
        for name in asked.arms or ARMS:
            if (name, seed) not in read_rows():
                add_row(run_arm(name, ARMS[name], seed))


def table(arms: Iterable[str]) -> str:
    """Mean over seeds, and avg@4 of every seed."""
    rows = read_rows()
    lines = ["| | avg@4 | of seeds | best@4 | distinct 4-grams | mean length |", "|---|---|---|---|---|---|"]
    for name in ("base", "wide_teacher", *arms):
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
    """Into the file as it is now: several of these commands may run side by side, a seed each."""
    rows = read_rows() | {(row["arm"], row["seed"]): row}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"rows": list(rows.values()), **describe_machine()}, indent=1) + "\n")
    print({key: row[key] for key in ("arm", "seed", "avg_at_k", "best_at_k", "mean_length")}, flush=True)


if __name__ == "__main__":
    main()
