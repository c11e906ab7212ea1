"""Where the seconds go, and what the terminal shows."""

import contextlib
import hashlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True)


def derive_seed(seed: int, *path: object) -> int:
    """A seed of its own for every purpose, step and process: nothing random has a state to be saved."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *path))).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


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
        self._seconds[name] += time.perf_counter() - start

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


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, shown: bool = True) -> Iterator["Bar"]:
    """A bar with rate and time left on a terminal; a line every twentieth elsewhere."""
    live = shown and sys.stderr.isatty()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console, disable=not live, transient=False) as progress:
        task = progress.add_task(description, total=total, completed=done, rate="")
        yield Bar(progress, task, description, total, done, lines=shown and not live)


class Bar:
    """A bar that is under way."""

    def __init__(self, progress: Progress, task: Any, description: str, total: int, done: int, *, lines: bool) -> None:
        self._progress, self._task, self._description = progress, task, description
        self._total, self._done, self._first, self._lines = total, done, done, lines
        self._start = time.perf_counter()

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more as done; `note` is shown behind the description."""
        before, self._done = self._done, self._done + count
        rate = (self._done - self._first) / max(1e-9, time.perf_counter() - self._start)
        shown = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
        self._progress.update(
            self._task, completed=self._done, rate=shown, description=f"{self._description} {note}".strip()
        )
        if self._lines and (before * 20 // self._total != self._done * 20 // self._total or self._done == self._total):
            console.print(f"{self._description} {self._done}/{self._total} {note} {shown}", highlight=False)
