"""Multimodal models as student and teacher: their text side is trained, their vision tower kept, and the student loads."""

import pytest
import torch
from families_tiny import make_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import MODELS, miniature_recipe
from oprd.models.pretrained import load_tokenizer
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe

CONTAINERS = ("gemma3", "gemma4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava", "internvl")
FAST = {"gemma3", "qwen2_5_vl"}

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(family, folder, train_file, loader, **changes):
    """The saved student and the model it started from, after two steps towards another model of the family."""
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model(family, seed).save_pretrained(folder / name)
        load_tokenizer(str(MODELS / "base")).save_pretrained(folder / name)
    tree = miniature_recipe(
        folder / "run", train_file, teacher={"type": "local", "model": str(folder / "teacher"), "dtype": "float32"},
        student={"model": str(folder / "student")}, prompts_per_step=2, max_steps=2, rollout={"max_completion_length": 8},
        **changes,
    )  # fmt: skip
    run_recipe(parse_recipe(tree))
    return [loader.from_pretrained(path) for path in (folder / "run" / "student", folder / "student")]


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in CONTAINERS])
def test_the_text_side_is_trained_and_the_vision_tower_kept(family, tmp_path, train_file):
    loader = AutoModelForCausalLM if family.startswith("gemma") else AutoModelForImageTextToText
    student, start = trained(family, tmp_path, train_file, loader)
    decoder = {name for name, _ in start.get_decoder().named_parameters()}
    before = dict(start.named_parameters())
    for name, weight in student.named_parameters():
        in_text = any(name.endswith(own) for own in decoder) and "language_model" in name
        assert torch.equal(weight, before[name]) != in_text, name


def test_a_family_whose_text_model_stands_alone_is_trained_without_its_vision_tower(tmp_path, train_file):
    student, start = trained("qwen3_5", tmp_path, train_file, AutoModelForCausalLM)
    assert type(student).__name__ == type(start).__name__ == "Qwen3_5ForCausalLM"
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(start(ids).logits, make_model("qwen3_5")(input_ids=ids).logits)
    before, after = start.model.named_parameters(), student.model.named_parameters()
    assert not any(torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
