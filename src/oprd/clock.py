"""Where the seconds of a step go."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds of something that happens inside of sections, such as waiting for other ranks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class Clock:
    """Seconds of one step by section, without those of `watches` in it; what no section covers is `other`."""

    def __init__(self, device: torch.device, **watches: Stopwatch) -> None:
        self._device, self._watches = device, watches
        self._start = time.perf_counter()
        self._before = {name: watch.seconds for name, watch in watches.items()}
        self._seconds: dict[str, float] = {"rollout": 0.0, "teacher": 0.0, "update": 0.0}

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._wait_for_device()
        start, apart = time.perf_counter(), self._apart
        try:
            yield
        finally:
            self._wait_for_device()
            own = time.perf_counter() - start - (self._apart - apart)
            self._seconds[name] = self._seconds.get(name, 0.0) + own

    def seconds(self) -> dict[str, float]:
        """By section and watch; the same names on every rank."""
        found = self._seconds | {name: x.seconds - self._before[name] for name, x in self._watches.items()}
        return found | {"other": time.perf_counter() - self._start - sum(found.values())}

    @property
    def _apart(self) -> float:
        return sum(watch.seconds for watch in self._watches.values())

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU, resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
