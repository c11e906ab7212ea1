"""`oprd fit-bridge`: from a recipe with objective `oprd_bridge` to the file that it names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from oprd.bridge.file import BridgeFile, Side
from oprd.bridge.fit import HELD_OUT, FitJob, fit
from oprd.data.prompts import load_prompts
from oprd.distributed import Ranks
from oprd.errors import ConfigError, DataError
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import load_student, student_facts
from oprd.models.probe import EVERYTHING, check_family
from oprd.objectives.oprd_bridge import BridgeObjective
from oprd.progress import progress_bar
from oprd.recipe import Recipe
from oprd.seeds import derive_seed
from oprd.student import InitialStudent
from oprd.teacher.local import LocalTeacher
from oprd.train.accelerator import open_accelerator
from oprd.train.pair import Given, check_pairs, teacher_context
from oprd.train.setup import engine_context
from oprd.types import Prompt, Rollouts

MAX_RANK = 4096
"""Largest rank in the file, cut to the smaller width; it contains every smaller one."""


def fit_bridge(recipe: Recipe, given: Given | None = None) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Fit the bridge and write it to the objective's `bridge`, which is never overwritten. Returns the path and the held-out
    numbers by the student's block (`BridgeFile.curves`). Raises an OprdError, as early as can be known.
    """
    found = {term.bridge: term for term in recipe.objective if isinstance(term, BridgeObjective)}
    if len(found) != 1:
        raise ConfigError(f"fit-bridge needs a recipe with one objective.bridge to write; this one has {len(found)}")
    (objective,) = found.values()
    path = Path(objective.bridge)
    if path.exists():
        raise ConfigError(f"objective.bridge: {path} is there already; give another name, or delete it to fit again")
    job = prepare_fit(recipe, objective, given or Given())
    student, teacher = Side.of(job.student.lm), Side.of(job.teacher.model.lm)
    with progress_bar(f"fit {path.name}", -(-len(job.prompts) // job.batch_size)) as bar:
        max_rank = min(MAX_RANK, student.width, teacher.width)
        solutions = fit(job, max_rank=max_rank, after_batch=lambda rows: bar.advance(1, f"{rows} rows"))
    file = BridgeFile(student=student, teacher=teacher, setting=job.setting, solutions=solutions)
    file.save(path)
    return path, file.curves()


def prepare_fit(recipe: Recipe, objective: BridgeObjective, given: Given) -> FitJob:
    """Check everything cheap, then load both models."""
    accelerator, rollout = open_accelerator(recipe), recipe.rollout
    recipe = recipe.model_copy(update={"bf16": accelerator.mixed_precision == "bf16"})
    ranks, room = Ranks(accelerator), rollout.max_completion_length
    if ranks.size > 1:
        raise ConfigError(f"fit-bridge runs in one process, {ranks.size} were launched")
    facts = student_facts(recipe.student, given.student, given.tokenizer)
    context = teacher_context(recipe, given, facts, (), ranks, InitialStudent())
    teacher_facts = recipe.teacher.facts(context)
    check_pairs(recipe, (objective,), teacher_facts)
    if teacher_facts.model is None or recipe.teacher.uses_initial_student:
        raise ConfigError(f"a bridge is fitted to one local teacher, not to one of type {recipe.teacher.type!r}")
    limit = min(objective.fit_prompts, recipe.data.limit or objective.fit_prompts)
    prompts = load_prompts(
        recipe.data.model_copy(update={"limit": limit}), facts.tokenizer,
        context=facts.context, room=room, vocabulary=facts.vocabulary, given=given.prompts,
    )  # fmt: skip
    if int(len(prompts) * HELD_OUT) < 1:
        raise DataError(
            f"{recipe.data.prompts} has {len(prompts)} prompts, of which held_out={HELD_OUT} leaves none to measure on; give "
            "more prompts"
        )
    model = load_student(recipe.student, given.student, seed=recipe.seed).to(cast(Any, accelerator.device))
    lm = LanguageModel(model=model, tokenizer=facts.tokenizer, name=recipe.student.model)
    check_family(lm, EVERYTHING)
    student = FrozenModel(lm, lambda: accelerator.autocast())
    engine_facts = engine_context(recipe, ranks, prompts)
    rollout.engine.check(facts, engine_facts)
    engine, sampling = rollout.engine.build(student, engine_facts), rollout.sampling(samples=rollout.group_size)

    def write(some: Sequence[Prompt], number: int) -> Rollouts:
        with engine.session():
            return engine.generate(some, sampling, seed=derive_seed(recipe.seed, "fit", number))

    return FitJob(
        student=student,
        teacher=cast(LocalTeacher, recipe.teacher.build(teacher_facts, context)),
        setting=objective.setting(facts.blocks, teacher_facts.model.blocks),
        prompts=tuple(recipe.teacher.render(prompts, teacher_facts, room)),
        write=write,
        batch_size=max(1, engine.at_once(engine_facts.tokens) // rollout.group_size),
        micro_batch_tokens=recipe.micro_batch_tokens,
    )
