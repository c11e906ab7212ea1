"""The method in one screen: the student writes, the teacher answers on what it wrote, the student learns from that."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oprd.models import LanguageModel, read_states
from oprd.objectives.base import Objective
from oprd.rollout.base import RolloutEngine, Sampling
from oprd.teacher.base import Teacher
from oprd.types import MicroBatch, PromptBatch, Reading, Rollouts, States, TeacherTargets, targets_for


def collect(
    engine: RolloutEngine, teacher: Teacher, prompts: PromptBatch, sampling: Sampling, *, seed: int
) -> tuple[Rollouts, Rollouts]:
    """What the student wrote with its current weights, and what it will learn on: the same, with the teacher's answers
    attached where they are fetched at once, or another trajectory where the teacher rewrites."""
    written = engine.generate(prompts, sampling, seed=seed)
    return written, teacher.prepare(written)


class DistillModel(nn.Module):
    """Everything that gets gradient. DDP and FSDP wrap this module, so the loss is computed inside its forward:
    around a call of the bare student, DDP would not reduce the gradients, without an error."""

    def __init__(self, lm: LanguageModel, objectives: tuple[Objective, ...]) -> None:
        super().__init__()
        self.student = lm.model
        self.lm = lm
        self.objectives = objectives
        # those with tensors of their own: they move, train, shard and are stored with the student
        self.modules_of_objectives = nn.ModuleList(o for o in objectives if isinstance(o, nn.Module))
        self.readings = tuple(dict.fromkeys(r for objective in objectives for r in objective.readings))
        self.teacher_readings = tuple(dict.fromkeys(r for objective in objectives for r in objective.teacher_readings))
        self.uses_head = any(objective.uses_head for objective in objectives)
        self.teacher_head = any(objective.teacher_head for objective in objectives)
        # accelerate wraps these classes when it shards (FSDP2)
        self._no_split_modules = lm.core._no_split_modules

    def forward(self, batch: MicroBatch, targets: TeacherTargets) -> tuple[Float[Tensor, " N"], ...]:
        """One value per supervised token and objective. Gradient flows to the student."""
        states = read_states(self.lm, batch, self.readings, head=self.uses_head)
        return tuple(
            objective.per_token(states, targets_for(objective.needs, targets)) for objective in self.objectives
        )

    @torch.no_grad()
    def read(self, batch: MicroBatch, readings: Iterable[Reading], head: bool, then: Callable[[States], Any]) -> Any:
        """`then` of the student's states, without gradient; called inside, where sharded weights are whole."""
        return then(read_states(self.lm, batch, readings, head=head))

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Tensor:
        """transformers' generate, through the wrapper for the same reason."""
        return self.student.generate(**kwargs)  # type: ignore[operator, no-any-return]
