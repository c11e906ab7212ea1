"""The one-page example runs, learns and stays one page."""

import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from conftest import ROOT, miniature_recipe
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from train.runs import assert_same_weights, metrics, saved_student

EXAMPLE = ROOT / "examples" / "minimal_loop.py"


@pytest.mark.slow
def test_the_minimal_loop_learns():
    AcceleratorState._reset_state()  # the precision of an earlier test's run
    losses = runpy.run_path(str(EXAMPLE))["main"]()
    assert losses[-1] < 0.8 * losses[0]


def test_the_minimal_loop_is_one_page_without_our_loop():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 70
    assert "oprd.train" not in text
    assert "oprd.algorithm" not in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_make_the_run_of_one_process(tmp_path, train_file):
    """By the example of several nodes, both on this machine, one process each."""
    tree = miniature_recipe(tmp_path / "alone", train_file, max_steps=2, adam_epsilon=1e-4)
    run_recipe(parse_recipe(tree))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree | {"output_dir": str(tmp_path / "run")}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MAIN_NODE": "127.0.0.1", "PORT": str(port), "NODES": "2", "GPUS": "1", "STRATEGY": "--multi_gpu", "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    said = [(tmp_path / f"node-{node}.txt").open("w") for node in (0, 1)]
    nodes = [
        subprocess.Popen(
            [str(ROOT / "examples" / "nodes.sh"), str(tmp_path / "recipe.yaml")],
            env=os.environ | common | {"NODE_RANK": str(node)}, stdout=said[node], stderr=said[node], start_new_session=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    try:
        codes = [node.wait(timeout=500) for node in nodes]
    finally:
        for node, file in zip(nodes, said, strict=True):
            file.close()
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    assert codes == [0, 0], "".join((tmp_path / f"node-{node}.txt").read_text()[-3000:] for node in (0, 1))
    assert_same_weights(saved_student(tmp_path / "alone"), saved_student(tmp_path / "run"))
    assert len(metrics(tmp_path / "run")) == 2
