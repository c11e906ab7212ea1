"""What the terminal shows while something runs."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
"""Prints a text as it is: brackets in it, such as a path's or a server's, are no markup."""


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, done: int = 0, shown: bool = True) -> Iterator["Bar"]:
    """A bar with rate and time left on a terminal; a line at every twentieth elsewhere."""
    live = shown and sys.stderr.isatty()
    described, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
    columns = (SpinnerColumn(), described, BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), rate)
    with Progress(*columns, console=console, disable=not live) as progress:
        progress.add_task(description, total=total, completed=done, rate="")
        yield Bar(progress, description, total, done, lines=shown and not live)


class Bar:
    """A running bar."""

    def __init__(self, progress: Progress, description: str, total: int, done: int, *, lines: bool) -> None:
        self._progress, self._description, self._lines = progress, description, lines
        self._total, self._done, self._first, self._start = total, done, done, time.perf_counter()

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more as done; `note` is shown behind the description."""
        before, self._done = self._done, self._done + count
        rate = (self._done - self._first) / max(1e-9, time.perf_counter() - self._start)
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
        label = f"{self._description} {note}".strip()
        self._progress.update(self._progress.task_ids[0], completed=self._done, rate=speed, description=label)
        if self._lines and (before * 20 // self._total != self._done * 20 // self._total or self._done == self._total):
            console.print(f"{self._description} {self._done}/{self._total} {note} {speed}")
