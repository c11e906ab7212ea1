"""Every family in the table is read as its own forward pass computes it, or refused by name."""

import pytest
import torch
from families_tiny import BY_NAME, BY_PROBE, FAMILIES, SUPPORTED, make_model

from conftest import MODELS
from oprd.errors import ModelError
from oprd.models.families import without_router_losses
from oprd.models.language_model import LanguageModel
from oprd.models.loading import ModelFacts
from oprd.models.pretrained import load_tokenizer
from oprd.models.probe import EVERYTHING, Use, check_family, freeze_unreached
from oprd.types import ALL_TOKENS, Batch, HiddenSpec, Taps

LAST = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
FIRST = HiddenSpec(block=1, at="token", tokens=ALL_TOKENS)
TOKENIZER = load_tokenizer(str(MODELS / "base"))

pytestmark = pytest.mark.filterwarnings("ignore")


def lm_of(family):
    model = make_model(family)
    without_router_losses(model)
    return LanguageModel(model=model, tokenizer=TOKENIZER, name=family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in BY_NAME])
def test_a_family_is_right_or_refused(family):
    lm = lm_of(family)
    if family in BY_PROBE:
        with pytest.raises(ModelError, match=BY_PROBE[family][0]):
            check_family(lm, EVERYTHING)
    else:
        check_family(lm, Use(taps=Taps(hidden=(FIRST,), head=True)))


@pytest.mark.parametrize("family", sorted(BY_NAME))
def test_a_family_is_refused_before_it_is_loaded(family):
    with pytest.raises(ModelError, match=f"{family}.*this family is not supported"):
        ModelFacts.read(make_model(family), TOKENIZER)


def test_a_wrong_head_is_no_obstacle_where_none_is_used():
    check_family(lm_of("modernbert_decoder"), Use(taps=Taps(hidden=(LAST,))))


def test_wrong_writing_is_no_obstacle_where_nothing_is_written():
    lm = lm_of("minimax")
    with pytest.raises(ModelError, match="the logits of its cached generation from padded prompts are not those"):
        check_family(lm, EVERYTHING)
    check_family(lm, Use(taps=Taps(head=True), text=False))


@pytest.mark.slow
@pytest.mark.parametrize("taps", [Taps(hidden=(FIRST,)), Taps(hidden=(LAST,), head=True)], ids=["block 1", "head"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_what_is_left_trainable_is_what_gets_gradient(family, taps):
    lm, plain = lm_of(family), lm_of(family)
    freeze_unreached(lm, taps)
    ids = torch.arange(30, 70).reshape(2, 20)
    batch = Batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), prompt_lengths=(3, 8), completion_lengths=(17, 12)
    )
    gradients = []
    for model in (lm, plain):
        states = model.tap(batch, taps)
        (states.hidden[taps.hidden[0]].float() ** 2).sum().backward()
        head = () if states.head is None else (states.head.weight, states.head.bias)
        gradients.append({name: p.grad for name, p in model.model.named_parameters() if p.grad is not None})
        used = {id(p) for p in head}
        trainable = {name for name, p in model.model.named_parameters() if p.requires_grad and id(p) not in used}
        if model is lm:
            assert trainable == set(gradients[0]) - {n for n, p in lm.model.named_parameters() if id(p) in used}
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_whose_first_blocks_know_how_many_follow_is_refused():
    lm = lm_of("llama")
    lm.core.model.embed_tokens.register_forward_hook(lambda module, args, out: out * len(lm.core.model.layers))
    check_family(lm, EVERYTHING)
    with pytest.raises(ModelError, match="the hidden states of block 1 without deeper blocks are not those"):
        check_family(lm, Use(taps=Taps(hidden=(FIRST,))))


def test_a_model_whose_rows_see_their_padding_is_refused():
    lm = lm_of("llama")
    lm.core.model.layers[1].register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="the hidden states of block 2 are not those"):
        check_family(lm, Use(taps=Taps(hidden=(LAST,)), text=False))
