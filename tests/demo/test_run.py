"""`oprd demo` as a user meets it: Ctrl-C at any moment, the same command again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "oprd", "demo", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # a shell ignores Ctrl-C in what it starts in the background, and so would the demo under tests that run there
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(demo: subprocess.Popen[str], text: str) -> str:
    assert demo.stderr is not None
    seen = ""
    deadline = time.monotonic() + 300
    while text not in seen and time.monotonic() < deadline:
        line = demo.stderr.readline()
        if not line:
            break
        seen += line
    assert text in seen, seen
    return seen


def interrupt(demo: subprocess.Popen[str]) -> str:
    demo.send_signal(signal.SIGINT)
    _, rest = demo.communicate(timeout=120)
    assert demo.returncode == 130, rest
    assert "Traceback" not in rest
    assert "The same command goes on from there" in rest
    return rest


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_where_it_stopped(tmp_path):
    demo = start(tmp_path / "demo")
    read_until(demo, "evaluate held_out")
    interrupt(demo)  # while a shipped model is being scored

    demo = start(tmp_path / "demo")
    seen = read_until(demo, "opd 10/200")
    assert "going on" not in seen
    told = interrupt(demo)
    assert "stopped after step 1" in told

    demo = start(tmp_path / "demo")
    seen = read_until(demo, "going on after step 1")
    assert "evaluate" not in seen  # the shipped models' scores are on disk
    interrupt(demo)
