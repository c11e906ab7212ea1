"""How the user stops a run."""

import signal
import threading
from types import FrameType
from typing import Any

from oprd.progress import console


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
