"""From a recipe to a run that is ready to go: everything cheap is checked first, then the models are loaded."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import get_scheduler

from oprd.algorithm import DistillModel
from oprd.bridge.file import check_weights, weights_fingerprint
from oprd.config.models import SelfTeacherConfig
from oprd.config.recipe import EffOPDConfig, Recipe
from oprd.data.chat import stop_ids
from oprd.data.prompts import PromptSampler
from oprd.errors import ConfigError
from oprd.evaluate.benchmarks import Benchmark
from oprd.models import (
    LanguageModel,
    deepest_block,
    freeze_unused,
    frozen_copy,
    is_peft,
    load_student,
)
from oprd.objectives import Objective
from oprd.rollout.hf import HFEngine
from oprd.teacher.base import Teacher
from oprd.teacher.local import LocalTeacher
from oprd.train.check import Given, bridges_of, check, needs_start
from oprd.train.extrapolation import Extrapolation
from oprd.train.run_folder import RunFolder
from oprd.train.stages import first_stage
from oprd.train.talking import (
    connect,
    leaf,
    members,
    omni_term,
)
from oprd.train.teachers import Site, build_teachers
from oprd.types import Prompt, Reading, States


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is ready to go."""

    recipe: Recipe
    accelerator: Accelerator
    folder: RunFolder
    lm: LanguageModel
    stages: tuple[tuple[Objective, ...], ...]
    """The objectives of every stage."""
    stage: int
    """Which of them is under way."""
    trainable: tuple[nn.Parameter, ...]
    """What may get gradient in some stage."""
    trained: tuple[nn.Parameter, ...]
    """What has had gradient in this stage or one before it: what a checkpoint holds."""
    model: nn.Module
    """DistillModel in its DDP or FSDP wrapper."""
    readings: tuple[Reading, ...]
    """Every hidden state of the student that some objective needs, once."""
    teacher_readings: tuple[Reading, ...]
    """The same of the teacher."""
    uses_head: bool
    """Whether some objective needs the student's LM head."""
    teacher_head: bool
    """The same of the teacher."""
    teacher: Teacher
    engine: HFEngine
    prompts: tuple[Prompt, ...]
    sampler: PromptSampler
    benchmarks: tuple[Benchmark, ...]
    stop_ids: tuple[int, ...]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    read: Callable[..., Any]
    """DistillModel.read, through the wrapper where weights are sharded."""
    extrapolation: Extrapolation | None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Those of the stage under way."""
        return self.stages[self.stage]


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
    stage = first_stage(recipe)
    prepared = _prepare(recipe, accelerator, lm, trainable, checked.stages, stage)
    inner = prepared.inner

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
        stage=stage,
        trainable=trainable,
        trained=prepared.trained,
        model=prepared.model,
        readings=inner.readings,
        teacher_readings=inner.teacher_readings,
        uses_head=inner.uses_head,
        teacher_head=inner.teacher_head,
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
        optimizer=prepared.optimizer,
        scheduler=prepared.scheduler,
        extrapolation=prepared.extrapolation,
        read=read,
    )


def enter_stage(run: Run, stage: int) -> Run:
    """The same student, teacher and prompts with the stage's objectives, a fresh optimizer and a fresh schedule."""
    run.accelerator.free_memory()  # a wrapper that is still known would go on reducing the same gradients
    prepared = _prepare(run.recipe, run.accelerator, run.lm, run.trainable, run.stages, stage)
    return replace(
        run,
        stage=stage,
        trained=prepared.trained,
        model=prepared.model,
        readings=prepared.inner.readings,
        teacher_readings=prepared.inner.teacher_readings,
        uses_head=prepared.inner.uses_head,
        teacher_head=prepared.inner.teacher_head,
        optimizer=prepared.optimizer,
        scheduler=prepared.scheduler,
        extrapolation=prepared.extrapolation,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What depends on the objectives."""

    inner: DistillModel
    trained: tuple[nn.Parameter, ...]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    extrapolation: Extrapolation | None


def _prepare(
    recipe: Recipe,
    accelerator: Accelerator,
    lm: LanguageModel,
    trainable: tuple[nn.Parameter, ...],
    stages: tuple[tuple[Objective, ...], ...],
    stage: int,
) -> _Prepared:
    config = recipe.schedule()[stage]
    updates = config.max_steps * recipe.rollout.updates_per_rollout
    reached: set[nn.Parameter] = set()
    for objectives in stages[:stage]:
        _distill(lm, trainable, objectives)
        reached.update(parameter for parameter in trainable if parameter.requires_grad)
    distill = _distill(lm, trainable, stages[stage])
    reached.update(parameter for parameter in trainable if parameter.requires_grad)
    optimizer = _optimizer(recipe, distill, config.learning_rate or recipe.learning_rate)
    model, prepared = accelerator.prepare(distill, optimizer)
    assert isinstance(prepared.optimizer, torch.optim.Optimizer)
    if isinstance(model, FSDPModule):
        for method in ("read", "generate"):
            register_fsdp_forward_method(cast(nn.Module, model), method)
    return _Prepared(
        inner=cast(DistillModel, accelerator.unwrap_model(model, keep_torch_compile=False)),
        trained=tuple(parameter for parameter in trainable if parameter in reached),
        model=cast(nn.Module, model),
        optimizer=prepared.optimizer,
        scheduler=get_scheduler(
            recipe.lr_scheduler_type,
            prepared.optimizer,
            num_warmup_steps=math.ceil(recipe.warmup_ratio * updates),
            num_training_steps=updates,
        ),
        extrapolation=(
            None
            if recipe.extrapolation is None
            else _extrapolation(recipe.extrapolation, lm, accelerator, cast(nn.Module, model))
        ),
    )


def _distill(lm: LanguageModel, trainable: tuple[nn.Parameter, ...], objectives: tuple[Objective, ...]) -> DistillModel:
    """The student with these objectives; what they cannot reach is without gradient."""
    for parameter in trainable:
        parameter.requires_grad_(True)
    distill = DistillModel(lm, objectives)
    freeze_unused(lm, deepest_block(lm, distill.readings), head=distill.uses_head)
    return distill


def _extrapolation(
    config: EffOPDConfig, lm: LanguageModel, accelerator: Accelerator, model: nn.Module
) -> Extrapolation:
    def of_all(values: Sequence[float]) -> torch.Tensor:
        mine = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
        return cast(torch.Tensor, accelerator.gather(mine)).cpu()

    def reshard() -> None:
        # weights that FSDP left gathered after a forward pass would go on being used in place of the shards just written
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    sharded = accelerator.distributed_type == DistributedType.FSDP
    return Extrapolation(
        config,
        lm,
        add_shards=(lambda values: of_all(values).sum(0).tolist()) if sharded else list,
        everywhere=lambda value: of_all([value])[:, 0].tolist(),
        moved=reshard,
    )


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


def _optimizer(recipe: Recipe, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
    )
