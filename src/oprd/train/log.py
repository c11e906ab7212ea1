"""Where the seconds go, what is random, and how the user stops a run."""

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from oprd.progress import console


class Clock:
    """Seconds of one step by section; what no section covers is `other`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {"rollout": 0.0, "teacher": 0.0, "update": 0.0}

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._wait_for_device()
        start = time.perf_counter()
        yield
        self._wait_for_device()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        other = total - sum(self._seconds.values())
        return {f"time/{name}_s": round(s, 4) for name, s in (self._seconds | {"other": other}).items()}

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU, resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Interrupt:
    """Ctrl-C or SIGTERM asks the loop to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        # only the main thread may install handlers; elsewhere (notebook executors) the default behaviour stays
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.print("\nStopping after this step and saving a checkpoint; once more stops at once.")
