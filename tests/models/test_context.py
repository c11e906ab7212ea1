"""Rows beyond the length up to which a family reads each of them alike whatever is beside it."""

import json

import pytest
import torch
from families_tiny import make_model
from safetensors.torch import load_file

from conftest import MODELS, miniature_recipe
from oprd.errors import DataError
from oprd.models.pretrained import load_tokenizer
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
ROPES = ["llama_dynamic_rope", "phi3_longrope"]
PROMPT = 6
"""Tokens of the prompt."""


def recipe(family, folder, length, **changes):
    """One update on four given completions of nearly equal length: each a micro-batch, or all four together."""
    prompts = folder / "prompts.jsonl"
    rows = [{"problem": "1+2", "completion": "1" * n} for n in range(length - 4, length)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model(family, seed).save_pretrained(folder / name)
        load_tokenizer(str(MODELS / "base")).save_pretrained(folder / name)
    return miniature_recipe(
        folder / "run", prompts, student={"model": str(folder / "student")}, max_steps=1, health_tokens=0,
        teacher={"type": "local", "model": str(folder / "teacher"), "dtype": "float32"},
        rollout={"source": {"type": "dataset"}, "max_completion_length": length}, adam_epsilon=1e-4, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("family", ROPES)
def test_the_split_into_micro_batches_does_not_change_the_update(family, tmp_path):
    tree, saved = recipe(family, tmp_path, 32 - PROMPT), []
    for tokens in (32, 1000):
        run_recipe(parse_recipe(tree | {"micro_batch_tokens": tokens, "output_dir": str(tmp_path / str(tokens))}))
        saved.append(load_file(tmp_path / str(tokens) / "student" / "model.safetensors"))
    for name, weight in saved[0].items():
        torch.testing.assert_close(weight, saved[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ROPES)
def test_longer_rows_are_refused_with_the_reason(family, tmp_path, capsys):
    tree = recipe(family, tmp_path, 33 - PROMPT)
    with pytest.raises(DataError, match=r"the prompt has 6 tokens, the context less max_completion_length leaves 5; "):
        run_recipe(parse_recipe(tree))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("prompt and completion have to fit 32 tokens; beyond 32 tokens its") == 2
    assert "rope would read every row by the longest one beside it." in said
    assert not (tmp_path / "run").exists()
