"""When checkpoints are due, and the one that is written while training goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, final

from torch import Tensor

from oprd.distributed import Ranks
from oprd.student import Student
from oprd.train.checkpoint import Snapshot, snapshot, stored, write_checkpoint


@final
class Saving:
    """Every method but `wait` is called on all ranks."""

    def __init__(self, folder: Path, student: Student, ranks: Ranks, every: int | str, keep: int) -> None:
        self._folder, self._student, self._ranks, self._keep = folder, student, ranks, keep
        self._steps = every if isinstance(every, int) else None
        self._seconds = 0.0 if isinstance(every, int) else 60.0 * int(every.split()[0])
        self._writers = ranks.apart()
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step: by its number, or by the main rank's clock."""
        if self._steps is not None:
            return step % self._steps == 0
        return self._ranks.any_rank(self._ranks.is_main and time.monotonic() - self._last >= self._seconds)

    def begin(self, step: int, state: Callable[[], dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Copy what a checkpoint holds, once the one before is written, and write it while training goes on. A step that is
        stored already stays as it is."""
        self.finish()
        self._last = time.monotonic()
        if self._ranks.any_rank(self._ranks.is_main and stored(self._folder, step)):
            return
        taken = snapshot(step, self._student, self._ranks, state, tensors)
        if self._ranks.sharded or self._ranks.is_main:
            # ends with the process: what is half written has another name
            self._thread = Thread(target=self._write, args=(taken,), name="checkpoint", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint is written. Raises on every rank what went wrong."""
        self.wait()
        error, self._error = self._error, None

        def tell() -> None:
            if error is not None:
                raise error

        self._ranks.on_main(tell)

    def wait(self) -> None:
        """Wait for this rank's part."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether what is written in the background went wrong, as far as is known."""
        return self._error is not None

    def _write(self, taken: Snapshot) -> None:
        try:
            write_checkpoint(self._folder, taken, self._writers, self._keep)
        except Exception as error:
            self._error = error
