"""Where the seconds of a step go."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


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
        try:
            yield
        finally:
            self._wait_for_device()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        other = total - sum(self._seconds.values())
        return {f"time/{name}_s/sum": round(s, 4) for name, s in (self._seconds | {"other": other}).items()}

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU, resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
