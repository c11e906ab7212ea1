"""Rows that are read behind each other without padding: which families can, found by trying."""

import pytest
from families_tiny import make_model

from conftest import MODELS
from oprd.models.language_model import LanguageModel
from oprd.models.loading import load_tokenizer
from oprd.models.probe import packing, packs

CAN = ("llama", "qwen3", "gemma3_text", "gpt2", "deepseek_v3", "phi3", "gemma3", "llama4_text", "olmo3", "mixtral")
CANNOT = {
    "mamba": "a state goes from token to token",
    "qwen3_next": "so in its linear attention",
    "jamba": "so in its Mamba blocks",
    "lfm2": "so in its convolutions",
    "bloom": "its positions are distances, counted over the whole row",
    "opt": "it counts positions itself",
    "openai_gpt": "its attention does not end with the row",
}


def lm_of(name):
    return LanguageModel(model=make_model(name), tokenizer=load_tokenizer(str(MODELS / "base")), name=name)


@pytest.mark.parametrize("name", CAN)
def test_a_family_whose_attention_ends_with_the_row_packs(name):
    assert packs(lm_of(name))


@pytest.mark.parametrize("name", CANNOT)
def test_a_family_that_would_mix_rows_is_padded_and_the_user_told(name, capsys):
    assert not packing(lm_of(name), wanted=True).packs
    assert f"{name} cannot read several rows packed into one; its rows are padded." in capsys.readouterr().err
