"""Verify answers under a hard time limit.

math-verify's own limits use alarms, which break in threads and in async code, and sympy can hang in C where no alarm
reaches. So answers are judged in worker processes of ours, which are killed and replaced. Workers are started as plain
commands (not by multiprocessing), so this works from threads, notebooks and scripts without a `__main__` guard.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

from oprd.errors import OprdError

START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one answer."""

    outcome: Literal["correct", "wrong", "no_answer", "timed_out", "crashed"]
    extracted: str | None
    """The answer as it was found in the completion."""

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


class Verifier:
    """Judges completions against known answers with `workers` processes of at most `timeout_s` seconds an answer.

    A context manager; workers live until it ends, and end by themselves when this process dies.
    """

    def __init__(self, *, timeout_s: float = 5.0, workers: int = 2) -> None:
        self._timeout_s = timeout_s
        self._count = workers
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="verify")

    def __enter__(self) -> "Verifier":
        for _ in range(self._count):
            self._idle.put(_Worker())
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def verify(self, completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per completion, in order. A completion that cannot be judged in time never stops the rest."""
        return list(self._pool.map(self._one, completions, answers))

    def _one(self, completion: str, answer: str) -> Verdict:
        worker = self._idle.get()
        try:
            verdict = worker.ask(completion, answer, self._timeout_s)
        finally:
            self._idle.put(worker)
        return verdict


class _Worker:
    """One judging process, started when first asked and started again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, completion: str, answer: str, timeout_s: float) -> Verdict:
        process = self._started()
        line, timed_out = _exchange(process, json.dumps({"completion": completion, "answer": answer}), timeout_s)
        if line:
            return Verdict(**json.loads(line))
        self.stop()
        return Verdict(outcome="timed_out" if timed_out else "crashed", extracted=None)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "oprd.evaluate.judge"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C in the terminal is for the training loop, not for them
            )
            line, _ = _exchange(self._process, None, START_TIMEOUT_S)
            if line.strip() != "ready":
                self.stop()
                raise OprdError(
                    f"the answer-checking process did not start within {START_TIMEOUT_S:.0f} s; "
                    f"run `{sys.executable} -m oprd.evaluate.judge` to see why"
                )
        return self._process


def _exchange(process: "subprocess.Popen[str]", message: str | None, timeout_s: float) -> tuple[str, bool]:
    """(the next line, empty if the process ended, whether it was killed for its time)."""
    assert process.stdin is not None
    assert process.stdout is not None
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        process.kill()

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        if message is not None:
            process.stdin.write(message + "\n")
            process.stdin.flush()
        return process.stdout.readline(), killed.is_set()
    except BrokenPipeError:
        return "", killed.is_set()
    finally:
        timer.cancel()
