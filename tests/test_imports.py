"""Imports point one way, and the project names no machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SOURCE = ROOT / "src" / "oprd"
LAYERS = [
    {"errors", "types", "progress", "seeds"},
    {"config"},
    {"data", "models", "kernels"},
    {"rollout", "teacher", "bridge"},
    {"objectives"},
    {"algorithm"},
    {"evaluate"},
    {"train"},
    {"demo", "diagnose", "report"},
    {"cli"},
]
"""A module imports from its own layer and those before."""


def layer_of(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("oprd."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_one_way(file):
    place = file.relative_to(SOURCE)
    own = place.parts[0].removesuffix(".py")
    if own in {"__init__", "__main__"}:
        return
    for name in imports(file):
        assert layer_of(name) <= layer_of(own), f"{place} imports oprd.{name}"


def test_the_report_reads_files_only():
    assert imports(SOURCE / "report" / "html.py") == {"errors"}


def test_a_recipe_is_read_without_loading_torch():
    code = "import sys, oprd; from oprd.config.reading import load_recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
