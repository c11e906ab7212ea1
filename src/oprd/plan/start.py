"""The plan at the start of a training: a run that cannot fit its device is refused before weights are loaded."""

import os

import psutil
import torch

from oprd.distributed import Ranks
from oprd.errors import DoesNotFit
from oprd.plan.plan import GB, Device, Place, explain, plan_checked
from oprd.progress import console
from oprd.recipe import Recipe
from oprd.train.pair import Given
from oprd.train.setup import Checked

UNCHECKED = "OPRD_UNCHECKED_MEMORY"
"""Environment variable that starts a run whatever the plan says."""


def refuse_what_cannot_fit(recipe: Recipe, given: Given, checked: Checked, ranks: Ranks) -> None:
    """Raise DoesNotFit, with the plan and what would help, on every rank if one has too little memory.

    Runs that are small beside the memory are not simulated, nor are those of model objects, which hold theirs already.
    """
    free = -ranks.max(-_free_bytes(ranks.device))
    objects = given.student is not None or given.teacher is not None
    if objects or os.environ.get(UNCHECKED) or at_most(recipe, checked) <= free:
        return
    # what is planned is the least that a run takes: nothing is reserved beside it
    device = Device(name=f"{ranks.device} (what is free now)", memory_gb=free / GB, reserved_gb=0)
    place = Place(device=device, processes=ranks.size, sharded=ranks.sharded)
    try:
        plan = plan_checked(recipe, checked, place)
    except Exception as error:  # a model whose code needs tensors with content
        if ranks.is_main:
            console.print(f"This run's memory was not planned ({type(error).__name__}: {error}); it starts unchecked.")
        return
    if not plan.fits:
        told = explain(recipe, plan, given)
        raise DoesNotFit(f"the run needs more memory than there is\n{told}\nto start all the same, set {UNCHECKED}=1")


def _free_bytes(device: torch.device) -> float:
    """Of the device, or, on a CPU, this process's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def at_most(recipe: Recipe, checked: Checked) -> float:
    """Bytes that a run never takes, by a generous formula of its sizes."""
    student, others, longest = checked.student, checked.teacher.members or {"": checked.teacher}, checked.engine.tokens
    models = [student, *(one.model for one in others.values() if one.model)]
    written = longest * max(
        recipe.prompts_per_step * recipe.rollout.group_size,
        *(len(benchmark.prompts) * recipe.evaluation.samples for benchmark in checked.benchmarks),
        1,
    )
    weights = 32 * student.parameters + 8 * sum(model.parameters for model in models)
    # 64 numbers for each of a block's outputs, and attention's scores where a kernel keeps them
    width = max(model.width * model.blocks for model in models)
    activations = max(longest, min(recipe.micro_batch_tokens, written)) * width * (256 + longest)
    cached = min(recipe.rollout.engine.cache_tokens, written)
    logits = 32 * max(model.vocabulary for model in models) * (1024 + cached // longest)
    return weights + activations + cached * student.blocks * student.width * 8 + logits
