"""How the user stops a run."""

import signal
import threading
from types import FrameType
from typing import Any

from oprd.progress import console


class Interrupt:
    """Ctrl-C, SIGTERM, SIGHUP or SIGQUIT asks the loop to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = int(signal.SIGINT)
        """The one that asked; of another rank's nothing is known."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        # only the main thread may install handlers; elsewhere (notebook executors) the default behaviour stays
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.signal = True, number
        console.print("\nStopping after this step and saving a checkpoint; once more stops at once.")
