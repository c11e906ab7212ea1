"""Loading by name: attention kernels of families that have no sdpa, and code that is never run."""

import shutil

import pytest
import torch
from families_tiny import make_model

from conftest import MODELS
from oprd.models.loading import StudentConfig, load_frozen, load_student, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(MODELS / "base"))


def save(name, folder):
    """A tiny model of the family as a folder, with a tokenizer."""
    make_model(name).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (MODELS / "base" / file).is_file():
            shutil.copy(MODELS / "base" / file, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("llama", "sdpa"), *((f, "eager") for f in ("gemma2", "gpt_oss", "mamba", "bloom", "gptj", "gpt_neo", "mpt"))],
)
def test_a_family_without_sdpa_is_loaded_with_eager_attention(family, kernel, tmp_path, tokenizer):
    folder = save(family, tmp_path)
    student = load_student(StudentConfig(model=folder))
    teacher = load_frozen(folder, tokenizer, torch.device("cpu"), dtype=torch.float32).lm.core
    assert student.config._attn_implementation == teacher.config._attn_implementation == kernel


def test_a_kernel_that_is_asked_for_is_used(tmp_path):
    student = load_student(StudentConfig(model=save("llama", tmp_path), attn_implementation="eager"))
    assert student.config._attn_implementation == "eager"
