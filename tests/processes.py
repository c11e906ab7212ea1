"""Real limits and real processes for tests."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--standalone")


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_two(launcher: Sequence[str], worker: Path, argument: Path, *, timeout: float, **environment: str) -> int:
    """The exit code of a launcher's two processes of `worker`, all of which end with it. What they print is in errors.txt
    beside the worker."""
    with worker.with_name("errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, str(worker), str(argument)],
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment,
        )
        try:
            return process.wait(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
