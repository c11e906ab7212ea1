"""The demo: the embedded miniature, distilled by OPRD and by sampled-token OPD from the same start."""

import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from oprd.demo.task import sums, write_jsonl
from oprd.evaluate.benchmarks import EvaluationConfig
from oprd.evaluate.evaluate import Evaluation, evaluate_model, print_table
from oprd.files import read_jsonl
from oprd.progress import console
from oprd.recipe import Recipe, parse_recipe
from oprd.train.run import run_recipe

MODELS = Path(__file__).parent / "models"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 4000, 200
OBJECTIVES = {"opd": ({"type": "opd_sampled"}, 8e-4), "oprd": ({"type": "oprd", "tokens": "all"}, 4e-3)}
"""(objective, learning rate): the best rates tried for each on this task (benchmarks/results/demo.json)."""


def run_demo(out: Path, *, seed: int = 0) -> None:
    """Train both students, score all four models, print the table. An interrupted demo goes on where it stopped."""
    start = time.perf_counter()
    disable_progress_bar()  # these models load in an instant
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = out / "train.jsonl", out / "held_out.jsonl"
    write_jsonl(train, sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(held_out, sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    console.print("A student of 0.8M parameters adds and subtracts badly; its teacher does it well.", highlight=False)
    before = _score(MODELS / "base", out / "before", held_out)
    teacher = _score(MODELS / "teacher", out / "teacher", held_out)
    trained = []
    for name in OBJECTIVES:
        result = run_recipe(demo_recipe(name, out / name, train, held_out, seed=seed)).result
        trained.append((f"{name.upper()} ({result.seconds / 60:.1f} min)", result.evaluations[0]))
    print(f"\n{HELD_OUT_PROBLEMS} held-out problems, 4 samples each:")
    print_table([("student before", before), *trained, ("teacher", teacher)])
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all")
    print(f"look closer: oprd report {' '.join(str(out / name) for name in OBJECTIVES)}")


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
    """avg@4 at temperature 1: how every number for the miniature is measured."""
    return {"benchmarks": [str(held_out)], "samples": 4, "sampling_temperature": 1.0, "max_completion_length": 80}


def _score(model: Path, out: Path, held_out: Path) -> Evaluation:
    """The score of a shipped model; an interrupted demo may have left it."""
    known = read_jsonl(out / "evaluations.jsonl")
    if known:
        return Evaluation.from_row(known[0])
    config = EvaluationConfig.model_validate(evaluation_options(held_out))
    return evaluate_model(str(model), config, out=out)[0]
