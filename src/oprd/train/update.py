"""One optimizer step: micro-batches, one division, one update."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.distributed.tensor import DTensor

from oprd.data.collate import collate_student, split_by_tokens
from oprd.errors import TrainingStopped
from oprd.objectives.base import Objective
from oprd.train.build import Run
from oprd.train.log import Clock
from oprd.train.processes import gather
from oprd.types import MicroBatch, Rollouts, TeacherTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimizer step, over all processes."""

    losses: tuple[float, ...]
    """Weighted mean of each objective before its coefficient."""
    supervised: tuple[int, ...]
    """Supervised tokens of each objective."""
    grad_norm: float
    finite: bool
    """False: the step was skipped."""


def update_step(run: Run, rollouts: Rollouts, clock: Clock) -> Update:
    """One optimizer step on the rollouts of all processes.

    Each objective's sum over tokens is divided once, by its divisor over all micro-batches and processes: however the
    batch is split, the update is the same. A process with fewer micro-batches repeats its first with weight zero.
    """
    accelerator, objectives = run.accelerator, run.stage.objectives
    micros = split_by_tokens(rollouts, run.recipe.micro_batch_tokens)
    divisors = [objective.divisor(rollouts) for objective in objectives]
    counts = [float(sum(rollouts.supervised(objective.tokens))) for objective in objectives]
    everywhere = gather(run, [float(len(micros)), *divisors, *counts])
    passes = int(everywhere[:, 0].max())
    denominators, supervised = everywhere[:, 1:].sum(0).split(len(objectives))
    # where the teacher's answers on all completions were lost or unusable there is nothing to learn, and no step is made
    learnable = bool((denominators > 0).any())
    denominators = denominators.clamp(min=1e-9)
    if not bool((supervised > 0).all()):
        raise TrainingStopped(
            "no token of this step is supervised: every completion is empty. Does the chat template end the prompt where "
            "the assistant starts to write, and is the stop token not the first thing it writes?"
            if rollouts.pairings is None
            else "no token of this step ends where one of the teacher's ends, so none is supervised. Does the student write "
            "text, does the teacher's tokenizer keep it as it is, and are completions longer than a word (length_schedule)?"
        )
    sums = torch.zeros(len(objectives), dtype=torch.float64)
    run.stage.model.train()
    for number in range(passes):
        real = number < len(micros)
        micro = micros[number] if real else micros[0]
        with clock.section("teacher"):
            targets = teacher_targets(run, micro)
        last = number == passes - 1
        with clock.section("update"), contextlib.nullcontext() if last else accelerator.no_sync(run.stage.model):
            values = run.stage.model(student_batch(run, micro), targets)
            # weighted on the device, one entry per supervised token of the micro-batch
            totals_here = [
                (value * _token_weights(objective, micro, value) * real).sum()
                for objective, value in zip(objectives, values, strict=True)
            ]
            loss = sum(
                o.coefficient * total / float(d)
                for o, total, d in zip(objectives, totals_here, denominators, strict=True)
            )
            # DDP and FSDP average gradients over processes; the denominator already counts all of them
            accelerator.backward(loss * accelerator.num_processes)
            sums += torch.stack([total.detach().double().cpu() for total in totals_here])
    with clock.section("update"):
        grad_norm = accelerator.clip_grad_norm_(run.stage.model.parameters(), run.recipe.max_grad_norm)
        norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else cast(torch.Tensor, grad_norm))
        losses = (gather(run, sums.tolist()).sum(0) / denominators).tolist()
        finite = learnable and math.isfinite(norm) and all(map(math.isfinite, losses))
        if finite:
            run.stage.optimizer.step()
        run.stage.optimizer.zero_grad()
    return Update(losses=tuple(losses), supervised=tuple(map(int, supervised.tolist())), grad_norm=norm, finite=finite)


def teacher_targets(run: Run, rollouts: Rollouts) -> TeacherTargets:
    """What the objectives of the stage under way need of the teacher."""
    distill = run.stage.distill
    return run.teacher.targets(rollouts, distill.teacher_readings, head=distill.teacher_head)


def student_batch(run: Run, rollouts: Rollouts) -> MicroBatch:
    """The rollouts behind the prompts as the student reads them, on its device."""
    return collate_student(rollouts, pad_id=run.lm.pad_id, device=run.accelerator.device)


def mean_of(updates: Sequence[Update]) -> Update:
    """The updates made with one rollout as one line: means of losses and norms, of those that were not skipped."""
    made = [update for update in updates if update.finite] or updates
    n = len(made)
    return Update(
        losses=tuple(sum(losses) / n for losses in zip(*(update.losses for update in made), strict=True)),
        supervised=made[0].supervised,
        grad_norm=sum(update.grad_norm for update in made) / n,
        finite=made[0].finite,
    )


def _token_weights(objective: Objective, micro: Rollouts, like: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(objective.weights(micro), dtype=like.dtype)
    return weights.repeat_interleave(torch.tensor(objective.supervised(micro))).to(like.device)
