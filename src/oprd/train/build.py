"""From a recipe to a run that is ready to go: everything cheap is checked first, then the models are loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from oprd.bridge.file import check_weights, weights_fingerprint
from oprd.config.models import SelfTeacherConfig
from oprd.config.recipe import Recipe
from oprd.data.chat import stop_ids
from oprd.data.prompts import PromptSampler
from oprd.errors import ConfigError
from oprd.evaluate.benchmarks import Benchmark
from oprd.models import (
    LanguageModel,
    frozen_copy,
    is_peft,
    load_student,
)
from oprd.objectives import Objective
from oprd.rollout.hf import HFEngine
from oprd.teacher.base import Teacher
from oprd.teacher.local import LocalTeacher
from oprd.train.check import Given, bridges_of, check, needs_start
from oprd.train.run_folder import RunFolder
from oprd.train.stages import Stage, first_stage, prepare_stage
from oprd.train.talking import (
    connect,
    leaf,
    members,
    omni_term,
)
from oprd.train.teachers import Site, build_teachers
from oprd.types import Prompt, States


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is ready to go."""

    recipe: Recipe
    accelerator: Accelerator
    folder: RunFolder
    lm: LanguageModel
    stages: tuple[tuple[Objective, ...], ...]
    """The objectives of every stage."""
    trainable: tuple[nn.Parameter, ...]
    """What may get gradient in some stage."""
    stage: Stage
    """The one under way."""
    teacher: Teacher
    engine: HFEngine
    prompts: tuple[Prompt, ...]
    sampler: PromptSampler
    benchmarks: tuple[Benchmark, ...]
    stop_ids: tuple[int, ...]
    read: Callable[..., Any]
    """DistillModel.read, through the wrapper where weights are sharded."""


def build(recipe: Recipe, given: Given | None = None) -> Run:
    """Check, load, wrap."""
    given = given or Given()
    # accelerate keeps its first precision for the whole process; a second run in one process has its own recipe
    AcceleratorState._reset_state()
    # the recipe says it all: a launcher's mixed precision setting is not looked at
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.bf16 else "no",
        log_with=list(recipe.report_to) or None,
        project_dir=recipe.output_dir,
    )
    _refuse_separate_processes(accelerator)
    checked = check(recipe, given, world_size=accelerator.num_processes)
    accelerator.wait_for_everyone()
    folder = RunFolder(recipe.output_dir)
    served = connect(recipe, checked.teacher_tokenizers, checked.prompts, accelerator)

    student = load_student(recipe.student, given.student)
    lm = LanguageModel(model=student, tokenizer=checked.tokenizer, name=recipe.student.model)
    for bridge in bridges_of(checked.stages):
        check_weights(bridge.config.bridge, "student", bridge.file.student, weights_fingerprint(lm))
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        _refuse_sharded(recipe, student, checked.stages)
    frozen = None
    omni = omni_term(recipe)
    own = any(isinstance(leaf(member), SelfTeacherConfig) for member in members(recipe.teacher).values())
    anchored = (omni is not None and omni.anchor > 0) or needs_start(checked.stages)
    if not is_peft(student) and (own or anchored):
        frozen = frozen_copy(student).to(accelerator.device)
    trainable = tuple(parameter for parameter in student.parameters() if parameter.requires_grad)
    stage = prepare_stage(recipe, accelerator, lm, trainable, checked.stages, first_stage(recipe))
    inner = stage.distill

    def read(batch: Any, readings: Any, head: bool, then: Callable[[States], Any] = lambda states: states) -> Any:
        with accelerator.autocast():
            return inner.read(batch, readings, head, then)

    stops = stop_ids(checked.tokenizer, lm.core.generation_config)
    site = Site(
        recipe=recipe, given=given, checked=checked, lm=lm, frozen=frozen, accelerator=accelerator, read=read,
        generate=inner.generate, stops=stops, served=served,
    )  # fmt: skip
    teacher = build_teachers(site)
    teacher.check_prompts(checked.prompts)
    for bridge in bridges_of(checked.stages):
        assert isinstance(teacher, LocalTeacher)
        check_weights(bridge.config.bridge, "teacher", bridge.file.teacher, weights_fingerprint(teacher.lm))
    engine = HFEngine(
        lm,
        stops,
        max_sequences=recipe.rollout.max_sequences,
        generate=inner.generate,
        autocast=lambda: accelerator.autocast(),
        same_steps=sharded,
    )
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        folder=folder,
        lm=lm,
        stages=checked.stages,
        trainable=trainable,
        stage=stage,
        teacher=teacher,
        engine=engine,
        prompts=checked.prompts,
        sampler=PromptSampler(
            checked.prompts,
            per_step=recipe.prompts_per_step,
            seed=recipe.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ),
        benchmarks=checked.benchmarks,
        stop_ids=stops,
        read=read,
    )


def enter_next_stage(run: Run) -> Run:
    """The same student, teacher and prompts with the next stage's objectives, a fresh optimizer and a fresh schedule."""
    run.accelerator.free_memory()  # a wrapper that is still known would go on reducing the same gradients
    stage = prepare_stage(run.recipe, run.accelerator, run.lm, run.trainable, run.stages, run.stage.number + 1)
    return replace(run, stage=stage)


def _refuse_separate_processes(accelerator: Accelerator) -> None:
    """Processes that accelerate does not see would train alone, each writing the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but each would train alone (accelerate sees "
            f"{accelerator.num_processes}); on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )


def _refuse_sharded(recipe: Recipe, student: nn.Module, stages: tuple[tuple[Objective, ...], ...]) -> None:
    """Raise ConfigError for what FSDP cannot do."""
    if recipe.stages:
        raise ConfigError(
            "stages wrap the student anew for each objective, which FSDP cannot undo; run the second stage from the first "
            "one's student, or use DDP"
        )
    if is_peft(student) and needs_start(stages):
        raise ConfigError(
            "oprd_bridge with space 'student' reads the student with LoRA off another number of times on each process, which "
            "FSDP waits for forever; use DDP, or train all weights"
        )
    if any(bridge.config.refit_every is not None for bridge in bridges_of(stages)):
        raise ConfigError(
            "refit_every reads another number of micro-batches on each process, which FSDP waits for forever"
        )
