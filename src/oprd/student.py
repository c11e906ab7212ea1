# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""The student: one object holds model, wrapper, optimizer and scheduler. Nobody else touches the wrapper."""

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, Literal, cast, final

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from oprd.errors import ConfigError
from oprd.models.language_model import FrozenModel, LanguageModel, Model, detached, evaluating, is_peft, train_mode
from oprd.models.probe import freeze_unreached
from oprd.models.quantization import require_bitsandbytes
from oprd.objectives.base import Objective
from oprd.section import NonNegativeFloat, PositiveFloat, Rate, Section, Share
from oprd.seeds import derive_seed
from oprd.types import Batch, HiddenStates, LMHead, Taps, Targets


class DistillModel(nn.Module):
    """Everything that gets gradient. DDP and FSDP wrap this module, so the loss is computed inside its forward: around
    a call of the bare student DDP would not reduce the gradients, without an error."""

    def __init__(self, lm: LanguageModel, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.student = lm.model
        self.lm = lm
        self.objectives = tuple(objectives)
        self.taps = reduce(or_, (objective.student_taps for objective in objectives), Taps())
        # accelerate wraps these classes when it shards (FSDP2)
        self._no_split_modules = lm.core._no_split_modules  # pyright: ignore[reportPrivateUsage]

    def forward(self, batch: Batch, targets: Targets) -> tuple[Float[Tensor, " N"], ...]:
        """One value per supervised token and objective. Gradient flows to the student."""
        states = self.lm.tap(batch, self.taps)
        return tuple(objective.per_token(states, targets) for objective in self.objectives)

    @torch.no_grad()
    def hidden(self, batch: Batch, taps: Taps) -> HiddenStates:
        """Hidden states without gradient, called through the wrapper, where sharded weights are whole."""
        return self.lm.tap(batch, taps)

    @torch.no_grad()
    def evaluate(self, batch: Batch, targets: Targets) -> tuple[Float[Tensor, " N"], ...]:
        """`forward` without gradient."""
        return self.forward(batch, targets)

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Any:
        """transformers' generate, through the wrapper for the same reason."""
        return cast(Any, self.student).generate(**kwargs)


class OptimizerSection(Section):
    """AdamW and its schedule. Names follow transformers.TrainingArguments."""

    optim: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    """adamw_8bit holds the moments in 2 bytes a weight instead of 8, by bitsandbytes; not under FSDP."""
    learning_rate: Rate = 1e-5
    """The peak, after warm-up."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over the run."""
    warmup_ratio: Share = 0.03
    """Share of the updates over which the learning rate rises to its peak, in equal steps from above 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, of every trained tensor."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""

    def share_of_peak(self, done: int, updates: int) -> float:
        """Of the learning rate, for the update behind `done` of all `updates`: never 0, at which an update does nothing."""
        warmup = math.ceil(self.warmup_ratio * updates)
        if self.lr_scheduler_type == "constant":
            return 1.0
        if done < warmup:
            return (done + 1) / (warmup + 1)
        if self.lr_scheduler_type == "constant_with_warmup":
            return 1.0
        left = (updates - done) / max(1, updates - warmup)
        return max(0.0, left if self.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))

    def check_optimizer(self, weights: str, *, sharded: bool) -> None:
        """Raise ConfigError for what cannot be, before anything is loaded. `weights`: how the student's are held."""
        if self.optim == "adamw_8bit":
            require_bitsandbytes("optim 'adamw_8bit'")
        if sharded and (self.optim == "adamw_8bit" or weights != "float32"):
            raise ConfigError(
                f"optim is {self.optim!r} and student.weights {weights!r}, but FSDP shards float32 weights and their moments; "
                "use adamw_torch and float32, or DDP"
            )


@final
class Student(Model):
    """The model in training, through its DDP or FSDP wrapper."""

    def __init__(
        self,
        lm: LanguageModel,
        objectives: Sequence[Objective],
        accelerator: Accelerator,
        settings: OptimizerSection,
        updates: int,
        writer: FrozenModel | None = None,
    ) -> None:
        """`updates`: optimizer steps of the whole run, for the learning rate's schedule. `writer`: a copy that writes."""
        self.lm = lm
        self._writer = writer
        self.between_steps = True
        """False from the first update of a step until the loop has counted the step: a checkpoint would hold half a step."""
        self._accelerator = accelerator
        self._settings = settings
        inner = DistillModel(lm, objectives)
        self.objectives, self.taps = inner.objectives, inner.taps
        freeze_unreached(lm, self.taps)
        wrapped, prepared = accelerator.prepare(inner, _adamw(inner, settings))
        self.wrapper = cast(nn.Module, wrapped)
        if isinstance(self.wrapper, FSDPModule):
            for method in ("hidden", "evaluate", "generate"):
                register_fsdp_forward_method(self.wrapper, method)
        self._inner = cast(DistillModel, accelerator.unwrap_model(self.wrapper, keep_torch_compile=False))
        self.optimizer: torch.optim.Optimizer = prepared.optimizer
        self.scheduler = LambdaLR(self.optimizer, lambda done: settings.share_of_peak(done, updates))

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def losses(self, batch: Batch, targets: Targets) -> tuple[Float[Tensor, " N"], ...]:
        """One value per supervised token and objective, with gradient."""
        train_mode(self.wrapper)
        with self._accelerator.autocast():  # accelerate enters it in the forward of DDP, but not in that of FSDP
            return self.wrapper(batch, targets)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Generator[None]:
        """Around a micro-batch: gradients are reduced over ranks at the last one only."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self.wrapper):
            yield

    def backward(self, loss: Tensor) -> None:
        # DDP and FSDP average gradients over ranks; the loss is divided by a total over all of them already
        self._accelerator.backward(loss * self._accelerator.num_processes)

    def clip_gradients(self) -> float:
        """Clip to max_grad_norm; the norm before."""
        norm = self._accelerator.clip_grad_norm_(self.wrapper.parameters(), self._settings.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else cast(Tensor, norm))

    def optimizer_step(self, *, skip: bool = False) -> None:
        """Update the weights and the learning rate unless `skip`, and drop the gradients."""
        if not skip:
            self.between_steps = False
            _step(self.optimizer, seed=self.scheduler.last_epoch)
            self.scheduler.step()
        self.optimizer.zero_grad()

    def hidden(self, batch: Batch, taps: Taps) -> HiddenStates:
        # the LM head of sharded weights is a shard again once the wrapper's forward has ended
        with evaluating(self.wrapper), self._accelerator.autocast():
            states = self._entry.hidden(batch, Taps(hidden=taps.hidden))
        head = _whole(self.lm.head()) if taps.head else None
        return HiddenStates(hidden=states.hidden, head=head, batch=batch)

    def evaluate(self, batch: Batch, targets: Targets) -> tuple[Float[Tensor, " N"], ...]:
        """`losses` in evaluation mode, without gradient."""
        with evaluating(self.wrapper), self._accelerator.autocast():
            return self._entry.evaluate(batch, targets)

    def generate(self, **kwargs: Any) -> Any:
        with evaluating(self.wrapper), self._accelerator.autocast():
            return self._entry.generate(**kwargs)

    @torch.no_grad()
    def writer(self) -> Model:
        if self._writer is None:
            return self
        for mine, copy in zip(self.lm.model.parameters(), self._writer.lm.model.parameters(), strict=True):
            if mine.requires_grad:
                copy.copy_(mine.full_tensor() if isinstance(mine, DTensor) else mine)
        return self._writer

    def weights(self) -> dict[str, Tensor]:
        adapter = is_peft(self.lm.model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
        gathered = cast(dict[str, Tensor], get_model_state_dict(self.wrapper, options=options))
        return {name.removeprefix("student."): x for name, x in gathered.items() if name.startswith("student.")}

    def reshard(self) -> None:
        """Let go of gathered copies: after weights were written, FSDP would go on using them in place of the shards."""
        for module in self.wrapper.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def _entry(self) -> DistillModel:
        """Where forward methods are called: FSDP hooks them on the wrapper; DDP only hooks `forward`."""
        return cast(DistillModel, self.wrapper) if isinstance(self.wrapper, FSDPModule) else self._inner


def _adamw(model: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW
    if settings.optim == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit as kind  # takes seconds to import
    return kind(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Update the weights; those in bfloat16 one tensor at a time in float32, rounded at random, on every rank alike."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    low = {p: p.grad for p in trained if p.dtype == torch.bfloat16}
    for parameter in low:
        parameter.grad = None
    if not low or len(low) < len(trained):
        optimizer.step()
    optimizer.zero_grad()
    for number, (parameter, gradient) in enumerate(low.items()):
        parameter.data = parameter.data.float()
        parameter.grad = cast(Tensor, gradient).float()
        optimizer.step()  # of this one alone: the others have no gradient
        parameter.grad = None
        parameter.data = _rounded_at_random(parameter.data, derive_seed(seed, "rounding", number))


def _rounded_at_random(x: Tensor, seed: int) -> Tensor:
    """Float32 numbers in bfloat16, each up or down with the probability that keeps its mean."""
    bits = x.view(torch.int32)
    draw = torch.Generator(x.device).manual_seed(seed)
    # a bfloat16 number is a float32 number without its last 16 bits
    dither = torch.randint(0, 1 << 16, bits.shape, generator=draw, dtype=torch.int32, device=x.device)
    return ((bits + dither) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


@final
class InitialStudent(Model):
    """The student before training: a frozen copy, or, of an adapter, the student with the adapter's first weights put in
    place. Usable once it is attached."""

    def attach(self, student: Student, copy: FrozenModel | None) -> None:
        """`copy` is None for a student with an adapter."""
        self._student, self._model = student, student if copy is None else copy
        self.lm = self._model.lm
        trained = [p for p in student.wrapper.parameters() if p.requires_grad] if copy is None else []
        self._first = [(p, p.detach().clone()) for p in trained]

    def hidden(self, batch: Batch, taps: Taps) -> HiddenStates:
        with self._before_training():
            return self._model.hidden(batch, taps)

    def generate(self, **kwargs: Any) -> Any:
        with self._before_training():
            return self._model.generate(**kwargs)

    @contextlib.contextmanager
    def _before_training(self) -> Generator[None]:
        now = [(p, p.detach().clone()) for p, _ in self._first]
        self._put(self._first)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        for parameter, value in weights:
            parameter.copy_(value)
        if weights:
            self._student.reshard()

    def weights(self) -> dict[str, Tensor]:
        return self._model.weights()


@torch.no_grad()
def _whole(head: LMHead) -> LMHead:
    """The LM head with sharded tensors gathered, detached."""
    parts = (head.weight, head.bias)
    weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in parts)
    assert weight is not None
    return detached(replace(head, weight=weight, bias=bias))
