"""The demo: the embedded miniature, distilled by OPRD and by sampled-token OPD from the same start."""

import json
import time
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from oprd.config.reading import parse_recipe
from oprd.config.recipe import Recipe
from oprd.demo.task import sums, write_jsonl
from oprd.evaluate.command import evaluate_model
from oprd.evaluate.run import Evaluation, evaluation_from
from oprd.evaluate.table import evaluation_table
from oprd.train.run import run_recipe

MODELS = Path(__file__).parent / "models"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 4000, 200
OBJECTIVES = {
    # learning rates: the best tried for each objective on this task (benchmarks/results/demo.json) [ours]
    "opd": ({"type": "opd", "divergence": "reverse_kl", "estimator": "sampled"}, 8e-4),
    "oprd": ({"type": "oprd", "layers": "all", "tokens": "all"}, 4e-3),
}


def run_demo(out: Path, *, seed: int = 0) -> dict[str, Evaluation]:
    """Train both students, score all four models, print the table. An interrupted demo goes on where it stopped."""
    start = time.perf_counter()
    disable_progress_bar()  # these models load in an instant
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = out / "train.jsonl", out / "held_out.jsonl"
    # the two splits are disjoint by construction, whatever the seeds
    write_jsonl(train, sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(held_out, sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    console = Console(stderr=True)
    console.print("A student of 0.8M parameters adds and subtracts badly; its teacher does it well.", highlight=False)
    scores = {
        "student before": _score(MODELS / "base", out / "before", held_out),
        "teacher": _score(MODELS / "teacher", out / "teacher", held_out),
    }
    minutes = {}
    for name in OBJECTIVES:
        done = run_recipe(demo_recipe(name, out / name, train, held_out, seed=seed))
        scores[name.upper()] = done.result.evaluations[0]
        minutes[name.upper()] = done.result.seconds / 60
    order = ["student before", "OPD", "OPRD", "teacher"]
    names = [f"{row} ({minutes[row]:.1f} min)" if row in minutes else row for row in order]
    result = Console()
    result.print(f"\n{HELD_OUT_PROBLEMS} held-out problems, 4 samples each:")
    result.print(evaluation_table([scores[row] for row in order], names=names, width=result.width))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")
    print(f"runs: {', '.join(str(out / name) for name in OBJECTIVES)}")
    print(f"look closer: oprd report {' '.join(str(out / name) for name in OBJECTIVES)}")
    return scores


def demo_recipe(objective: str, output_dir: Path, train: Path, held_out: Path, *, seed: int) -> Recipe:
    """The recipe of one of the two runs: equal in everything but objective and learning rate."""
    config, learning_rate = OBJECTIVES[objective]
    return parse_recipe(
        {
            "student": {"model": str(MODELS / "base")},
            "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
            "objective": config,
            "data": {"prompts": str(train)},
            "rollout": {"group_size": 2, "max_completion_length": 64},
            "evaluation": evaluation_options(held_out),
            "output_dir": str(output_dir),
            "prompts_per_step": 32,
            "micro_batch_tokens": 2048,  # similar lengths together: less padding to compute
            "max_steps": 200,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "health_tokens": 128,
            "save_steps": 25,
            "save_total_limit": 1,
            "seed": seed,
            "resume_from_checkpoint": "latest",
        }
    )


def evaluation_options(held_out: Path) -> dict[str, object]:
    """avg@4 at temperature 1, as METHODS' numbers for the miniature are taken."""
    return {
        "benchmarks": [str(held_out)],
        "samples": 4,
        "sampling_temperature": 1.0,
        "max_completion_length": 80,
        "max_sequences": 200,
    }


def _score(model: Path, out: Path, held_out: Path) -> Evaluation:
    """Score a shipped model, or read the score that an interrupted demo left."""
    known = out / "evaluations.jsonl"
    if known.is_file():
        return evaluation_from(json.loads(known.read_text(encoding="utf-8").splitlines()[0]))
    return evaluate_model(str(model), evaluation_options(held_out), out=out)[0]
