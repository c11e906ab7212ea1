"""One entry for the command line and for Python."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.config.models import StudentConfig, TeacherConfig
from oprd.config.objectives import HiddenMSEConfig, ObjectiveConfig
from oprd.config.reading import parse_recipe, part_to_dict
from oprd.config.recipe import Recipe
from oprd.train.build import build
from oprd.train.check import Given
from oprd.train.loop import Result, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """A finished distillation."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run_folder: Path
    result: Result


def run_recipe(recipe: Recipe, given: Given | None = None) -> Distilled:
    """Check, load, train, save. Raises an OprdError for what a user can mend, Interrupted on Ctrl-C."""
    run = build(recipe, given)
    result = train(run)
    return Distilled(model=run.lm.model, tokenizer=run.lm.tokenizer, run_folder=run.folder.path, result=result)


def distill(
    *,
    student: str | PreTrainedModel | StudentConfig,
    teacher: str | PreTrainedModel | TeacherConfig,
    prompts: str | os.PathLike[str] | datasets.Dataset,
    output_dir: str | os.PathLike[str],
    objective: ObjectiveConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Distilled:
    """Distil `teacher` into `student` on the student's own completions.

    Models by Hub name, folder or object; a model object is trained in place, in float32. `tokenizer` is needed with
    objects whose `name_or_path` holds none. Prompts by path, Hub name or `datasets.Dataset`. `options` are the keys of
    `Recipe` (`rollout=oprd.RolloutConfig(...)`, `learning_rate=1e-4`, ...). The default objective is OPRD as published.
    """
    given = Given(
        student=student if isinstance(student, nn.Module) else None,
        teacher=teacher if isinstance(teacher, nn.Module) else None,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        prompts=prompts if isinstance(prompts, datasets.Dataset) else None,
    )
    data = options.pop("data", None)
    source = "<dataset>" if isinstance(prompts, datasets.Dataset) else str(prompts)
    tree: dict[str, Any] = {
        "student": student if isinstance(student, StudentConfig) else {"model": _name(student)},
        "teacher": {"type": "local", "model": _name(teacher)} if isinstance(teacher, str | nn.Module) else teacher,
        "objective": objective if objective is not None else HiddenMSEConfig(),
        "data": (part_to_dict(data) if data is not None else {}) | {"prompts": source},
        "output_dir": str(output_dir),
    } | options
    return run_recipe(parse_recipe({key: part_to_dict(value) for key, value in tree.items()}), given)


def _name(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else model.name_or_path or type(model).__name__
