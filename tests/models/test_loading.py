"""Loading by name: attention kernels of families that have no sdpa, and code that is never run."""

import json
import shutil

import pytest
import torch
from families_tiny import make_model

from conftest import MODELS
from oprd.errors import ModelError
from oprd.models.loading import ModelFacts, StudentConfig, load_frozen, load_student
from oprd.models.pretrained import load_tokenizer


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


def test_code_in_a_models_folder_is_never_run_nor_asked_about(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(MODELS / "base", folder)
    mapped = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.L", "AutoTokenizer": ["evil.T", None]}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine", "auto_map": mapped}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": mapped}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for load in (
        lambda: ModelFacts.read(str(folder), tokenizer),
        lambda: load_student(StudentConfig(model=str(folder))),
        lambda: load_frozen(str(folder), tokenizer, torch.device("cpu"), dtype=torch.float32),
        lambda: load_tokenizer(str(folder)),
    ):
        with pytest.raises(ModelError, match="needs code from its own folder, and oprd runs none"):
            load()
    assert not (tmp_path / "ran").exists()
