"""The Triton kernel, without a GPU: in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="pip install triton; it comes with torch's CUDA builds")
def test_the_kernel_equals_the_definitions_in_tritons_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        str(Path(__file__).with_name("fused_in_interpreter.py")),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "9 passed" in run.stdout
