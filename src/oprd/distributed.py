"""Ranks: the only place of collectives. Without a launcher there is one rank and nothing is sent."""

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from jaxtyping import Float
from torch import Tensor

from oprd.clock import Stopwatch
from oprd.errors import OprdError, ServerError, TrainingStopped

T = TypeVar("T")
WRITING = timedelta(days=1)
"""For other ranks to write their part of a checkpoint; training waits for it only at the next one."""


@final
class Ranks:
    """The processes of a run. Every method is called on all of them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.device: torch.device = accelerator.device
        self.waiting = Stopwatch()
        """Of this rank in collectives, for the others and for what is sent."""
        self.group: dist.ProcessGroup | None = None
        """Of another thread's collectives; None: the launcher's."""
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        """Weights are sharded: every rank has to run the same number of forward passes."""

    def places(self, mine: Sequence[object]) -> range:
        """Of this rank's items among those of all, which are dealt out one by one."""
        return range(self.rank, self.size * len(mine), self.size)

    def in_step(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """The items with True, then the first again with False until all ranks have as many: sharded weights need it."""
        return [(item, True) for item in items] + [(items[0], False)] * (int(self.max(len(items))) - len(items))

    def all_gather(self, row: Sequence[float]) -> Float[Tensor, "R n"]:
        """The rows of all ranks, in float64, on the CPU."""
        mine = torch.tensor([list(row)], dtype=torch.float64)
        # alone, nothing is sent, and Apple's GPUs have no float64
        if self.size == 1:
            return mine
        with self.waiting.running():
            return cast(Tensor, self._accelerator.gather(mine.to(self.device))).cpu()

    def sum(self, row: Sequence[float]) -> list[float]:
        return list(map(float, row)) if self.size == 1 else self.all_gather(row).sum(0).tolist()

    def max(self, value: float) -> float:
        return float(value) if self.size == 1 else float(self.all_gather([value]).max())

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return bool(self.max(float(flag)))

    def gather_objects(self, rows: list[Any]) -> list[Any]:
        """The lists of all ranks behind each other."""
        if self.size == 1 or self.group is None:
            with self.waiting.running():
                return rows if self.size == 1 else gather_object(rows)
        found = cast(list[list[Any]], [None] * self.size)
        dist.all_gather_object(found, rows, group=self.group)
        return [row for one in found for row in one]

    def apart(self) -> "Ranks":
        """What another thread writes files by: the same processes in a group of their own where weights are sharded, else each
        rank alone."""
        other = copy.copy(self)
        if self.sharded and self.size > 1:
            other.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=WRITING))
        else:
            other.rank, other.size, other.is_main = 0, 1, True
        return other

    def on_main(self, act: Callable[[], None]) -> None:
        """Let the main rank do something while the others wait. What it raises is raised on all of them."""
        error: Exception | None = None
        if self.is_main:
            try:
                act()
            except Exception as caught:
                error = caught
        if (first := self.gather_objects([error])[0]) is not None:
            raise first

    def together(self, act: Callable[[], T]) -> T:
        """What `act` gives on this rank. It sends nothing to other ranks after the point where it may fail.

        Where it fails on one rank, all of them raise ServerError, or TrainingStopped for any other error, with its message:
        none waits for the others forever, and all can still save what was learned.
        """
        if self.size == 1:
            return act()
        result, error = None, None
        try:
            result = act()
        except Exception as caught:
            error = caught
        if self.any_rank(error is not None):
            message = error and (str(error) if isinstance(error, OprdError) else f"{type(error).__name__}: {error}")
            rows = self.gather_objects([(isinstance(error, ServerError), message)])
            served, message = next(row for row in rows if row[1] is not None)
            raise (ServerError if served else TrainingStopped)(message) from error
        return cast(T, result)

    def wait(self) -> None:
        """Wait for every rank."""
        with self.waiting.running():
            self._accelerator.wait_for_everyone()
