"""benchmarks/gpu.py on a CPU with tiny models: what is compared is the same update, and every path gives what it must."""

import importlib
import json
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_plain_code_and_this_package_make_the_same_update(gpu):
    arms = gpu.costs(tiny=True)["arms"]
    assert len(arms) == 2 * len(gpu.OBJECTIVES)
    for name in gpu.OBJECTIVES:
        ours, plain = arms[f"{name} ours"], arms[f"{name} plain"]
        assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=0.02, abs=1e-4), (
            name
        )  # the teacher is in bfloat16
        assert all(arm["seconds"] > 0 and arm["peak_gib"] > 0 for arm in (ours, plain))


@pytest.mark.slow
def test_every_path_gives_what_it_must(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "paths", str(tmp_path / "paths.json"), "--tiny"])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "paths.json").read_text())["paths"]
    assert {name for name, said in found.items() if said == "right"} == {path.__name__ for path in gpu.PATHS}
    monkeypatch.setattr(gpu, "PATHS", (lambda accelerator: 1 / 0,))
    assert gpu.main() == 1, "a path that fails fails the benchmark"


def test_what_has_to_travel_is_all_that_a_machine_with_torch_lacks():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_wheels.py"), "--list"]
    names = {line.partition("==")[0] for line in subprocess.check_output(command, text=True).split()}
    assert {
        "transformers",
        "tokenizers",
        "accelerate",
        "peft",
        "httpx2",
        "openai",
        "math-verify",
        "pydantic-core",
    } <= names
    assert not {"torch", "datasets", "pyarrow", "pandas", "plotly"} & names
