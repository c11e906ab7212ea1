"""What the tests of training share: completions of very unequal length, updates on them, and what a run folder holds."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import miniature_recipe
from oprd.clock import Clock
from oprd.distributed import Ranks
from oprd.recipe import parse_recipe
from oprd.student import Student
from oprd.train.saving import Saving
from oprd.train.setup import Parts, setup
from oprd.types import Rollouts

MACHINE = ("time/", "memory/", "training_seconds/")
"""Prefixes of metrics that depend on the machine."""
MIXTURE = [
    {"type": "opd_top_k", "support": "overlap", "tokens": {"first": 5}},
    {"type": "oprd", "weight": 10.0, "reduction": "sequence_mean"},
]


def rollouts_of(parts: Parts) -> Rollouts:
    """Five completions, one of them empty."""
    tokenizer = parts.method.student.lm.tokenizer
    texts = ["12+34=46\n46-5=41\n\\boxed{41}", "", "7", "1+2=3\n3+4=7\n7+5=12\n12-9=3\n\\boxed{3}", "9-9=0"]
    ids = tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)
    return Rollouts(prompts=parts.prompts[:5], completion_ids=ids, finished=(False,) * 5)


def update(parts: Parts, rollouts: Rollouts | None = None, step: int = 1) -> None:
    """One optimizer update."""
    parts.method.update(rollouts or rollouts_of(parts), step, Clock(torch.device("cpu")))


def save_checkpoint(folder: Path, step: int, student: Student, ranks: Ranks, keep: int = 1) -> None:
    """A checkpoint, written before this returns."""
    saving = Saving(folder, student, ranks, every=1, keep=keep)
    saving.begin(step, dict, {})
    saving.finish()


def weights_after(folder: Path, train_file: Path, steps: tuple[int, ...] = (1, 1), **changes: Any) -> dict[str, Any]:
    """The student's weights after updates at these steps: after a single one, Adam's first is no more than a sign."""
    parts = setup(parse_recipe(miniature_recipe(folder, train_file, **({"health_tokens": 0} | changes))))
    for step in steps:
        update(parts, step=step)
    return weights(parts)


def weights(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in parts.method.student.lm.model.state_dict().items()}


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    for name, value in ours.items():
        assert_close(value, theirs[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a log, or of a dataset, without their checksums."""
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [{key: value for key, value in row.items() if key != "crc32"} for row in rows]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The line of every step without what depends on the machine."""
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in read_lines(folder / "metrics.jsonl")]


def searches(folder: Path) -> list[dict[str, Any]]:
    """The line of every search of the extrapolation without its seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(folder / "searches.jsonl")]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The line of every evaluation without its seconds."""
    rows = read_lines(folder / "evaluations.jsonl")
    return [{k: v for k, v in row.items() if k != "training_seconds"} for row in rows]


def saved_student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path, *, evaluated: bool = True) -> None:
    """Bit for bit: metrics, evaluations, searches and the saved student."""
    assert metrics(one) == metrics(other)
    assert not evaluated or evaluations(one) == evaluations(other)
    assert searches(one) == searches(other)
    ours, theirs = saved_student(one), saved_student(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def write_completions(path: Path, train_file: Path) -> Path:
    """The training prompts with a completion of their own."""
    rows = [row | {"completion": "1+2=3\n\\boxed{3}"} for row in read_lines(train_file)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
