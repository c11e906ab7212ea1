"""What belongs on which device: float64 on the CPU only, as Apple's GPUs have none; a teacher object where the run computes."""

import ast
import copy
from types import SimpleNamespace

import pytest
import torch

from conftest import MODELS, ROOT, load_miniature, miniature_recipe
from oprd.models import loading
from oprd.models.loading import load_frozen
from oprd.recipe import load_recipe, parse_recipe
from oprd.train.accelerator import _in_bf16
from oprd.train.run import run_recipe

FILES = sorted((ROOT / "src" / "oprd").rglob("*.py"))
MOMENTS = "moments.py"
"""Sums of the bridge are in float64 on the device, and on the CPU beside a GPU that has none."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "src" / "oprd")))
def test_float64_is_asked_of_the_cpu_only(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == "double":
            of = ast.unparse(node.func.value)
            assert of.endswith(".cpu()"), f"line {node.lineno}: write {of}.cpu().double()"
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if named.get("dtype") == "torch.float64" and file.name != MOMENTS:
            assert named.get("device", "'cpu'") == "'cpu'", f"line {node.lineno}: float64 on {named['device']}"


def test_a_teacher_given_as_an_object_goes_to_the_device_that_is_asked_for(monkeypatch):
    for check in ("check_finite", "check_family"):  # meta stands for a GPU; its tensors have no values
        monkeypatch.setattr(loading, check, lambda *_: None)
    lm, device = load_miniature("teacher"), torch.device("meta")
    given = load_frozen(copy.deepcopy(lm.model), lm.tokenizer, device, dtype=torch.bfloat16)
    named = load_frozen(str(MODELS / "teacher"), lm.tokenizer, device, dtype=torch.bfloat16)
    assert given.lm.device == named.lm.device == device
    assert (given.lm.core.dtype, named.lm.core.dtype) == (torch.float32, torch.bfloat16)  # an object keeps its own


@pytest.mark.parametrize(
    ("asked", "device", "has_it", "expected"),
    [
        ("auto", "cuda", True, True), ("auto", "cuda", False, False), ("auto", "cpu", True, False), ("auto", "mps", True, False),
        (True, "cpu", False, True), (False, "cuda", True, False),
    ],
)  # fmt: skip
def test_auto_computes_in_bfloat16_on_a_gpu_that_has_it(asked, device, has_it, expected, monkeypatch):
    monkeypatch.setattr("oprd.train.accelerator.PartialState", lambda **_: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert _in_bf16(parse_recipe(miniature_recipe("run", "prompts.jsonl", bf16=asked))) is expected


def test_the_run_folder_says_what_auto_decided(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, max_steps=1)
    assert parse_recipe(tree).bf16 == "auto"
    run_recipe(parse_recipe(tree))
    assert load_recipe(tmp_path / "run" / "recipe.yaml").bf16 is False
