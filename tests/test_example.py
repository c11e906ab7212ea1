"""The one-page example runs, learns and stays one page."""

import runpy

import pytest
from accelerate.state import AcceleratorState

from conftest import ROOT

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
