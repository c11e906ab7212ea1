"""How the user stops a run."""

import signal
import threading
from types import FrameType
from typing import Any

from oprd.progress import console


class Interrupt:
    """Ctrl-C, SIGTERM, SIGHUP or SIGQUIT asks the loop to stop after the step or the batch of an evaluation; a second one stops at
    once. A signal that was ignored before stays so."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = int(signal.SIGINT)
        """The one that asked; of another rank's nothing is known."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        # only the main thread may install handlers; elsewhere (notebook executors) the default behaviour stays
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            before = self._previous[number]
            (before if callable(before) else signal.default_int_handler)(number, frame)
        self.asked, self.signal = True, number
        console.print("\nStopping after this step and saving a checkpoint; once more stops at once.")
