"""Blocks, states and logits of families that differ from the common ones, against the model's own forward pass."""

import pytest
import torch
from families_tiny import make_model

from conftest import MODELS
from oprd.errors import ModelError
from oprd.losses.chunked import logits
from oprd.models.language_model import LanguageModel
from oprd.models.pretrained import load_tokenizer
from oprd.models.probe import freeze_unreached
from oprd.types import Batch, HiddenSpec, Taps, TokenSelection

MULTIMODAL = ("gemma3", "gemma4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3", "llava", "internvl")
OWN_LOGITS = ("falcon_h1", "recurrent_gemma", "mpt", "gemma2", "cohere", "granite", "minicpm3", "nanochat", "xlstm")


def lm_of(name):
    return LanguageModel(model=make_model(name), tokenizer=load_tokenizer(str(MODELS / "base")), name=name)


def states_of(lm, block="last"):
    """States of one block at seven tokens, and the model's own output on them."""
    ids = torch.arange(10, 18)[None]
    batch = Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), prompt_lengths=(1,), completion_lengths=(ids.shape[1] - 1,)
    )
    spec = HiddenSpec(block=block, at="token", tokens=TokenSelection())
    with torch.no_grad():
        return lm.tap(batch, Taps(hidden=(spec,))).hidden[spec], lm.core(
            input_ids=ids, use_cache=False, output_hidden_states=True
        )


@pytest.mark.parametrize("family", [*MULTIMODAL, "llama4_text", "opt"])
def test_blocks_are_those_of_the_text_decoder(family):
    lm = lm_of(family)
    for block in (1, 3):
        states, own = states_of(lm, block)
        assert torch.equal(states, own.hidden_states[block][0, 1:])


@pytest.mark.parametrize("family", [*MULTIMODAL, *OWN_LOGITS, "llama4_text", "llama"])
def test_logits_are_the_models_own(family):
    lm = lm_of(family)
    states, own = states_of(lm)
    torch.testing.assert_close(logits(states, lm.head()), own.logits[0, 1:])


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava"])
def test_a_vision_tower_is_frozen_and_the_decoder_is_not(family):
    lm = lm_of(family)
    last = HiddenSpec(block="last", at="token", tokens=TokenSelection())
    freeze_unreached(lm, Taps(hidden=(last,), head=True))
    text = {id(p) for p in lm.decoder.parameters()} | {id(p) for p in lm.core.get_output_embeddings().parameters()}
    assert all(p.requires_grad == (id(p) in text) for p in lm.model.parameters())


def test_another_number_of_blocks_than_the_config_says_is_refused_by_name():
    lm = lm_of("llama")
    lm.core.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"llama \(llama\): 4 blocks found at 'layers', its config says 5"):
        _ = lm.num_blocks
