"""Adapters: which layers get one, and that an adapted family trains, saves and reloads."""

import copy

import pytest
import torch
from families_tiny import SUPPORTED, make_model
from peft import PeftModel
from test_families import TOKENIZER
from test_families_training import (
    assert_gradients_agree,
    batch_of,
    gradients,
    losses_of,
    own_losses,
    some,
    two,
)

from oprd.errors import ConfigError
from oprd.models.families import without_router_losses
from oprd.models.language_model import LanguageModel
from oprd.models.loading import LoraSection, StudentConfig, load_student
from oprd.models.pretrained import load_weights
from oprd.models.probe import freeze_unreached
from oprd.train.save import saved_weights
from oprd.types import HiddenSpec, Taps, TokenSelection

FAST = {"llama", "gpt2", "gemma3", "llama4_text", "phimoe", "mamba", "mixtral"}
LAST = HiddenSpec(block="last", at="predicting", tokens=TokenSelection())

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(model, **settings):
    """Under an adapter whose every weight matters."""
    student = load_student(StudentConfig(model="tiny", lora=LoraSection(r=2, **settings)), model)
    draw = torch.Generator().manual_seed(0)
    for parameter in (p for p in student.parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.05
    return student


@pytest.mark.parametrize("family", some(SUPPORTED, FAST))
def test_a_saved_family_loads_and_its_adapter_is_trained_saved_and_loaded(family, tmp_path):
    built, teacher = two(family)
    built.core.save_pretrained(
        tmp_path / "base", state_dict=saved_weights(built.core, built.core.state_dict(), torch.float32)
    )
    base = load_weights(str(tmp_path / "base"), dtype=torch.float32).eval()
    without_router_losses(base)
    torch.testing.assert_close(logits_of(base), logits_of(built.model), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(base)
    student = LanguageModel(model=adapted(base), tokenizer=TOKENIZER, name=family)
    batch = batch_of()
    right = gradients(student.model, own_losses(student, teacher, batch))
    freeze_unreached(student, Taps(hidden=(LAST,), head=True))
    assert_gradients_agree(gradients(student.model, losses_of(student, teacher, batch)), right)
    assert right.keys() == {name for name, p in student.model.named_parameters() if p.requires_grad}
    student.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), logits_of(student.model), rtol=1e-4, atol=1e-5)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=batch_of().input_ids[:1], use_cache=False).logits


def test_experts_of_one_weight_are_named_when_left_out_and_adapted_when_asked_for(capsys):
    adapted(make_model("mixtral"))
    said = " ".join(capsys.readouterr().err.split())
    assert "LoRA leaves out mlp.experts.down_proj, mlp.experts.gate_up_proj, which are no linear layers" in said
    student = adapted(make_model("mixtral"), target_modules=("q_proj", "experts.gate_up_proj"))
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert {"q_proj" in name or "mlp.experts" in name for name in trained} == {True}
    assert sum("mlp.experts" in name for name in trained) == 2 * 4
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        merged, once = student(input_ids=ids).logits, student.merge_and_unload()
        torch.testing.assert_close(once(input_ids=ids).logits, merged, rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"student\.lora: .*no_such"):
        adapted(make_model("llama"), target_modules=("no_such",))


def test_vision_towers_and_routers_get_no_adapter():
    for family, out in (("gemma3", "vision_tower"), ("phimoe", "router"), ("llama4_text", "router")):
        names = [name for name, p in adapted(make_model(family)).named_parameters() if p.requires_grad]
        assert names
        assert not any(out in name for name in names)
