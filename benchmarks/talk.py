"""Teachers that only talk, on the miniature: OmniOPD, its parts, and what else the same teacher can be used for.

    make serve-miniature &
    python benchmarks/talk.py --base-url http://127.0.0.1:8411/v1 --seeds 0 1 2 omni omni-random sampled sequence

Each run's line is added to benchmarks/results/talk.json; a variant and seed that is there already is not run again.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from oprd.config import parse_recipe
from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS, TRAINING_PROBLEMS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine

RESULTS = Path(__file__).parent / "results" / "talk.json"
OMNI = {"type": "omni_opd", "chunk_tokens": 8, "chunks": 3, "continuations": 6, "baseline": "batch_mean"}
VARIANTS: dict[str, dict[str, Any]] = {
    "omni": {"objective": OMNI, "learning_rate": 3e-4},
    "omni-published": {"objective": OMNI | {"baseline": "none"}, "learning_rate": 3e-4},
    "omni-leave-one-out": {"objective": OMNI | {"baseline": "leave_one_out"}, "learning_rate": 3e-4},
    "omni-no-anchor": {"objective": OMNI | {"anchor": 0.0}, "learning_rate": 3e-4},
    "omni-random": {"objective": OMNI | {"audit": "random"}, "learning_rate": 3e-4},
    "omni-no-prior": {"objective": OMNI | {"prior": 0.0}, "learning_rate": 3e-4},
    "sampled": {"objective": {"type": "opd", "estimator": "sampled"}, "learning_rate": 4e-4},
    # a completion has about 36 tokens, its audit 3 x 6 x 8: four times the prompts for as many teacher tokens
    "sequence": {"objective": {"type": "nll"}, "learning_rate": 3e-4, "prompts_per_step": 96, "teacher": "sequence"},
}


def recipe(name: str, seed: int, data: Path, teacher: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """One run: 24 prompts of 2 completions a step."""
    variant = VARIANTS[name] | changes
    if variant.pop("teacher", None) == "sequence":
        teacher = {"type": "sequence", "teacher": teacher}
    return {
        "student": {"model": str(MODELS / "base")},
        "teacher": teacher,
        "data": {"prompts": str(data / "train.jsonl")},
        "rollout": {"group_size": 2, "max_completion_length": 80, "max_sequences": 256},
        "evaluation": evaluation_options(data / "held_out.jsonl"),
        "output_dir": str(data / name),
        "prompts_per_step": 24,
        "max_steps": 100,
        "lr_scheduler_type": "constant",
        "health_tokens": 0,
        "save_steps": 1000,
        "eval_steps": 50,
        "seed": seed,
    } | variant


def run(name: str, seed: int, teacher: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    write_jsonl(folder / "train.jsonl", sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(folder / "held_out.jsonl", sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    tree = recipe(name, seed, folder, teacher, changes)
    done = run_recipe(parse_recipe(tree))
    steps = [json.loads(line) for line in (done.run_folder / "metrics.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (done.run_folder / "evaluations.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    tokens = "teacher/prompt_tokens/sum" if name == "sampled" else "teacher/completion_tokens/sum"
    return {
        "variant": name,
        "seed": seed,
        "changes": changes,
        "avg_at_4": {row["step"]: [round(row[f"avg_at_k{end}"], 4) for end in ("", "_low", "_high")] for row in scores},
        "length": {row["step"]: round(row["mean_length"], 1) for row in scores},
        "teacher_tokens": sum(row.get(tokens, 0) for row in steps),
        "requests": sum(row.get("teacher/requests/sum", 0) for row in steps),
        "first_and_last": [
            {key: value for key, value in row.items() if key.startswith(("omni/", "train/"))}
            for row in (steps[0], steps[-1])
        ],
        "minutes": round(done.result.seconds / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument(
        "--base-url", help="of a server with the miniature teacher; without one it runs in this process"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--changes", type=json.loads, default={}, help="keys of the recipe, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    model = str(MODELS / "teacher")
    teacher: dict[str, Any] = {"type": "local", "model": model, "dtype": "float32"}
    if given.base_url is not None:
        teacher = {
            "type": "server",
            "base_url": given.base_url,
            "model": "teacher",
            "tokenizer": model,
            "concurrency": 64,
        }
    for seed in given.seeds:
        for name in given.variants:
            rows = json.loads(given.out.read_text())["runs"] if given.out.is_file() else []
            if any((row["variant"], row["seed"], row["changes"]) == (name, seed, given.changes) for row in rows):
                continue
            rows.append(run(name, seed, teacher, given.changes))
            print(json.dumps(rows[-1]), flush=True)
            given.out.write_text(json.dumps({"runs": rows, **describe_machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
