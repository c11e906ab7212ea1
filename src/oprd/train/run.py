"""One entry for the command line and for Python."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.models.language_model import CausalLM
from oprd.models.loading import StudentConfig
from oprd.objectives.base import Objective
from oprd.plan.start import refuse_what_cannot_fit
from oprd.recipe import Recipe, parse_recipe
from oprd.section import Section
from oprd.teacher.base import TeacherConfig
from oprd.train.loop import Result, train
from oprd.train.pair import Given
from oprd.train.setup import setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """A finished distillation."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    run_folder: Path
    result: Result


def run_recipe(recipe: Recipe, given: Given | None = None) -> Distilled:
    """Check, load, train, save. Raises an OprdError for what a user can mend, Interrupted on Ctrl-C."""
    parts = setup(recipe, given, refuse_what_cannot_fit)
    result = train(parts)
    lm = parts.method.student.lm
    return Distilled(model=lm.model, tokenizer=lm.tokenizer, run_folder=parts.folder.path, result=result)


def distill(
    *,
    student: str | CausalLM | StudentConfig,
    teacher: str | CausalLM | TeacherConfig,
    prompts: str | os.PathLike[str] | datasets.Dataset,
    output_dir: str | os.PathLike[str],
    objective: Objective | list[Objective] | None = None,
    given: Given | None = None,
    **options: Any,
) -> Distilled:
    """Distil `teacher` into `student` on the student's own completions.

    Models by Hub name, folder or object; a model object is trained in place, in float32. `given` hands over tokenizers of
    objects whose `name_or_path` holds none. Prompts by path, Hub name or `datasets.Dataset`. `options` are the keys of
    `Recipe` (`rollout=oprd.RolloutConfig(...)`, `learning_rate=1e-4`, ...). The default objective is OPRD as published.
    """
    handed = given or Given()
    given = Given(
        student=student if isinstance(student, nn.Module) else None,
        teacher=teacher if isinstance(teacher, nn.Module) else None,
        tokenizer=handed.tokenizer,
        teacher_tokenizer=handed.teacher_tokenizer,
        prompts=prompts if isinstance(prompts, datasets.Dataset) else None,
    )
    source = "<dataset>" if isinstance(prompts, datasets.Dataset) else str(prompts)
    tree: dict[str, Any] = {
        "student": {"model": _name(student)} if isinstance(student, str | nn.Module) else student,
        "teacher": {"type": "local", "model": _name(teacher)} if isinstance(teacher, str | nn.Module) else teacher,
        "data": _plain(options.pop("data", {})) | {"prompts": source},
        "output_dir": str(output_dir),
    } | options
    if objective is not None:
        tree["objective"] = objective
    return run_recipe(parse_recipe(tree), given)


def _name(model: str | nn.Module) -> str:
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", "")) or type(model).__name__


def _plain(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json") if isinstance(section, Section) else dict(section)
