"""The processes of a launcher, in the recipe's precision."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from oprd.errors import ConfigError
from oprd.progress import console
from oprd.recipe import Recipe

LONGEST_WAIT = timedelta(hours=3)
"""For another rank, beside its wait for servers. Torch's 10 minutes would end a run whose completions are long on
one rank."""

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed updates weights inside its backward pass and keeps checkpoints of its own; FSDP2 shards what "
    "its ZeRO-3 shards",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM trains models of its own, which nothing here can tap",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "rollouts and losses need whole sequences and layers on every process; parallelism of data is "
    "what can be had",
}
"""What `accelerate launch` may ask for, by the variable that says so, and why it is not supported."""
FSDP2 = "use `accelerate launch --use_fsdp --fsdp_version 2`, or DDP"


def refuse_launch(environment: Mapping[str, str]) -> None:
    """Raise ConfigError, by name, for a strategy that training does not support, before any process waits for another."""

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in {"1", "true", "yes", "on"}

    for name, why in REFUSED.items():
        if on(name):
            raise ConfigError(f"{name} is set: {why}. {FSDP2}")
    if on("ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP1 was launched (FSDP_VERSION is not 2): it flattens the weights of a block into one tensor, from which neither heads nor "
            f"adapters can be read; {FSDP2}"
        )
    if on("ACCELERATE_USE_FSDP") and on("ACCELERATE_USE_CPU"):
        raise ConfigError("accelerate shards weights on GPUs only; without FSDP it trains by DDP on a CPU")


def open_accelerator(recipe: Recipe) -> Accelerator:
    """The launcher's processes, in the recipe's precision. Raises ConfigError where each would train alone."""
    refuse_launch(os.environ)
    # accelerate keeps its first precision for the whole process; a second run in one process has its own recipe
    AcceleratorState._reset_state()
    # the recipe says it all: a launcher's settings of precision, accumulation and compilation are not looked at
    accelerator = Accelerator(
        mixed_precision="bf16" if _in_bf16(recipe) else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # gradients are views of what DDP reduces, not copies beside it
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        dynamo_backend="no",
        log_with=list(recipe.report_to) or None,
        project_dir=recipe.output_dir,
    )
    bf16 = accelerator.mixed_precision == "bf16"
    if recipe.bf16 == "auto" and accelerator.device.type == "cuda" and bf16 and accelerator.is_main_process:
        console.print("Computing in bfloat16, which this GPU has; bf16=false computes in float32.")
    if bf16 and accelerator.distributed_type == DistributedType.FSDP and (fsdp := accelerator.state.fsdp_plugin):
        # accelerate's own policy sums gradients and hands out log-probabilities in bfloat16
        fsdp.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but each would train alone (accelerate sees "
            f"{accelerator.num_processes}); on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def longest_wait(recipe: Recipe) -> timedelta:
    """How long processes wait for each other: one may be waiting for servers, asked one after the other."""
    teachers = sum(teacher.longest_wait_s for teacher in recipe.teacher.members.values())
    return LONGEST_WAIT + timedelta(seconds=teachers + recipe.rollout.engine.longest_wait_s)


def _in_bf16(recipe: Recipe) -> bool:
    """Whether the student computes in bfloat16."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # which Accelerator looks at, and its state does not
    device: Any = PartialState(cpu=on_cpu, timeout=longest_wait(recipe)).device  # the process group starts here
    if recipe.bf16 == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return on_gpu or recipe.student.weights != "float32"
    if recipe.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("bf16 is true, but this GPU does not support bfloat16; set bf16=false")
    return recipe.bf16
