"""What the terminal shows while something is under way."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, soft_wrap=True)


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

    def __init__(
        self, progress: Progress, task: TaskID, description: str, total: int, done: int, *, lines: bool
    ) -> None:
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
