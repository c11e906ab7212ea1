"""Checking answers under a hard time limit, in worker processes that are killed and replaced.

math-verify's own limits use alarms, which break in threads and async code, and sympy can hang in C where no alarm reaches.
Workers are plain commands, not multiprocessing's: scripts need no `__main__` guard.
"""

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from oprd.errors import OprdError

START_TIMEOUT_S = 120.0
# a wait that takes no processor time ends after so many times the limit by the clock
MOST_WALL = 12
# a sympy.py in the working folder must not be run; that folder may be on PYTHONPATH as an empty entry
_START = (
    "import os, sys; sys.path = [p for p in sys.path if p and os.path.realpath(p) != os.getcwd()] + sys.argv[1:]; "
    "from oprd.verify.judge import main; main()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of checking one completion."""

    outcome: Literal["correct", "wrong", "no_answer", "timed_out", "crashed"]
    extracted: str | None
    """The answer found in the completion."""

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


class VerifierPool(contextlib.AbstractContextManager["VerifierPool"]):
    """Checks completions against known answers in `workers` processes, each in at most `timeout_s` seconds of processor time.

    The processes start when first needed. They end with `close` or the `with` block, and when this process dies.
    """

    def __init__(self, *, timeout_s: float = 5.0, workers: int = 2) -> None:
        self._workers = [_Worker(timeout_s) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker processes. A later `verify` starts them again."""
        for worker in self._workers:
            worker.stop()

    def verify(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per completion, in order; one that times out does not stop the rest. Raises OprdError when a worker
        does not start."""
        with ThreadPoolExecutor(max_workers=len(self._workers), thread_name_prefix="verify") as threads:
            return list(threads.map(self._one, completions, answers))

    def _one(self, completion: str, answer: str) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.check(completion, answer)
        finally:
            self._idle.put(worker)


class _Worker:
    """One judging process, started when first needed and again after it was killed."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def check(self, completion: str, answer: str) -> Verdict:
        process, start, most = self._process or self._start(), time.monotonic(), MOST_WALL * self._timeout_s
        line = _ask(process, completion, answer, self._timeout_s, wall_s=most)
        if line:
            return Verdict(**json.loads(line))
        self.stop()
        late = process.returncode == -signal.SIGPROF or time.monotonic() - start >= most
        return Verdict(outcome="timed_out" if late else "crashed", extracted=None)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        pipe, command = subprocess.PIPE, [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[2])]
        # a session of its own: Ctrl-C in the terminal is for the training loop, not for the worker
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", start_new_session=True
        )
        # the first answer builds math-verify's grammar
        if not _ask(self._process, r"\boxed{\frac{1}{2}}", "0.5", START_TIMEOUT_S, wall_s=START_TIMEOUT_S):
            self.stop()
            raise OprdError(
                f"the answer-checking process did not start within {START_TIMEOUT_S:.0f} s; "
                f"run `{shlex.join(command)}` to see why"
            )
        return self._process


def _ask(process: "subprocess.Popen[str]", completion: str, answer: str, timeout_s: float, *, wall_s: float) -> str:
    """The worker's line on an answer; empty if it died or was killed for its time."""
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    timer = threading.Timer(wall_s, process.kill)
    timer.start()
    try:
        item = {"completion": completion, "answer": answer, "seconds": timeout_s}
        print(json.dumps(item), file=process.stdin, flush=True)
        return process.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()
