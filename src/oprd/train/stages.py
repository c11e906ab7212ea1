"""The stages of a recipe: which one a step belongs to, and what depends on its objectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import get_scheduler

from oprd.algorithm import DistillModel
from oprd.config.recipe import EffOPDConfig, Recipe
from oprd.models import LanguageModel, deepest_block, freeze_unused
from oprd.objectives import Objective
from oprd.train.checkpoint import find_checkpoint
from oprd.train.extrapolation import Extrapolation
from oprd.train.run_folder import RunFolder


def stage_of(recipe: Recipe, step: int) -> int:
    """The stage whose update is the `step`-th, counted from 1."""
    return next(stage for stage, last in enumerate(recipe.last_steps()) if step <= last)


def first_stage(recipe: Recipe) -> int:
    """The stage to start in: that of the checkpoint to resume from, whose optimizer is stored there."""
    asked = recipe.resume_from_checkpoint
    found = find_checkpoint(RunFolder(recipe.output_dir).checkpoints, asked) if asked is not None else None
    return 0 if found is None else stage_of(recipe, int(found.name.partition("-")[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What depends on the objectives: made anew when the next stage begins."""

    number: int
    """From 0."""
    objectives: tuple[Objective, ...]
    distill: DistillModel
    """Which hidden states and LM heads the objectives need is known to it."""
    model: nn.Module
    """`distill` in its DDP or FSDP wrapper."""
    trained: tuple[nn.Parameter, ...]
    """What has had gradient in this stage or one before it: what a checkpoint holds."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    extrapolation: Extrapolation | None


def prepare_stage(
    recipe: Recipe,
    accelerator: Accelerator,
    lm: LanguageModel,
    trainable: tuple[nn.Parameter, ...],
    stages: tuple[tuple[Objective, ...], ...],
    number: int,
) -> Stage:
    """Wrap the student with the stage's objectives; a fresh optimizer and a fresh schedule."""
    config = recipe.schedule()[number]
    updates = config.max_steps * recipe.rollout.updates_per_rollout
    before = {p for objectives in stages[:number] for p in _with_gradient(_distill(lm, trainable, objectives))}
    distill = _distill(lm, trainable, stages[number])
    reached = before.union(_with_gradient(distill))
    optimizer = _optimizer(recipe, _with_gradient(distill), config.learning_rate or recipe.learning_rate)
    wrapped, prepared = accelerator.prepare(distill, optimizer)
    assert isinstance(prepared.optimizer, torch.optim.Optimizer)
    model = cast(nn.Module, wrapped)
    if isinstance(model, FSDPModule):
        for method in ("read", "generate"):
            register_fsdp_forward_method(model, method)
    extrapolation = recipe.extrapolation
    return Stage(
        number=number,
        objectives=stages[number],
        distill=cast(DistillModel, accelerator.unwrap_model(model, keep_torch_compile=False)),
        model=model,
        trained=tuple(parameter for parameter in trainable if parameter in reached),
        optimizer=prepared.optimizer,
        scheduler=get_scheduler(
            recipe.lr_scheduler_type,
            prepared.optimizer,
            num_warmup_steps=math.ceil(recipe.warmup_ratio * updates),
            num_training_steps=updates,
        ),
        extrapolation=_extrapolation(extrapolation, lm, accelerator, model) if extrapolation is not None else None,
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


def _with_gradient(distill: DistillModel) -> list[nn.Parameter]:
    return [parameter for parameter in distill.parameters() if parameter.requires_grad]


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
    )
