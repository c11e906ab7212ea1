"""The example in one page runs and learns."""

import importlib.util

from conftest import ROOT


def test_the_minimal_loop_learns():
    spec = importlib.util.spec_from_file_location("minimal_loop", ROOT / "examples" / "minimal_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = module.main()
    assert losses[-1] < 0.8 * losses[0]
