"""What a run saves is what it trained: types, ties, buffers, generation config; it loads by name and gives equal logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from conftest import MODELS, load_miniature, miniature_recipe
from models.families_tiny import make_model
from oprd.models.loading import StudentConfig, load_student
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from oprd.train.save import generation_config, saved_weights
from oprd.train.setup import setup

KEPT = {
    "deepseek_v3": "mlp.gate.e_score_correction_bias",
    "ernie4_5_moe": "mlp.gate.weight",
    "lfm2_moe": "feed_forward.expert_bias",
    "olmo_hybrid": "linear_attn.A_log",
    "hunyuan_v1_moe": "mlp.gate.wg.weight",
}


@pytest.mark.parametrize("family", KEPT)
def test_what_a_family_keeps_in_float32_is_saved_so(family, tmp_path):
    model = make_model(family)
    weights = saved_weights(model, model.state_dict(), torch.bfloat16)
    model.save_pretrained(tmp_path, state_dict=dict(weights))
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert {name: value.dtype for name, value in weights.items()} == {name: theirs[name].dtype for name in weights}
    kept = [name for name in weights if KEPT[family] in name]
    assert kept
    assert all(torch.equal(weights[name], model.state_dict()[name]) for name in kept)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "hunyuan_v1_moe"])
def test_the_copy_that_writes_in_bfloat16_is_the_model_that_transformers_loads_so(family, tmp_path, train_file):
    make_model(family).save_pretrained(tmp_path / "model")
    load_miniature("base").tokenizer.save_pretrained(tmp_path / "model")
    student, objective = {"model": str(tmp_path / "model")}, {"type": "opd"}
    tree = miniature_recipe(tmp_path / "run", train_file, student=student, objective=objective, bf16=True)
    ours = setup(parse_recipe(tree)).method.student.writer().lm.model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    assert any(KEPT[family] in name and p.dtype == torch.float32 for name, p in ours.named_parameters())
    assert_same_tensors(ours, theirs)
    ids = torch.arange(10, 30)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_student_given_as_an_object_is_held_in_bfloat16_as_one_by_name_is():
    """Rotary frequencies in bfloat16 are wrong by whole turns behind a few hundred tokens."""
    given = load_student(StudentConfig(model="base", weights="bfloat16"), load_miniature("base").model)
    assert_same_tensors(given, load_student(StudentConfig(model=str(MODELS / "base"), weights="bfloat16")))


def assert_same_tensors(ours, theirs):
    """Equal parameters and buffers, those that are not saved too."""
    kinds = [[*model.named_parameters(), *model.named_buffers()] for model in (ours, theirs)]
    assert [name for name, _ in kinds[0]] == [name for name, _ in kinds[1]]
    for (name, mine), (_, other) in zip(*kinds, strict=True):
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name


def test_integers_are_saved_as_they_are(tmp_path):
    model = make_model("qwen4_exp_text")
    before = model.state_dict()
    integers = [name for name, value in before.items() if not value.is_floating_point()]
    assert any(int(before[name].max()) > 2**24 for name in integers)  # a float cannot hold it
    for dtype in (torch.float32, torch.bfloat16):
        weights = saved_weights(model, before, dtype)
        assert all(torch.equal(weights[name], before[name]) for name in integers)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_tied_head_is_saved_once_and_loads_to_the_same_logits(bf16, tmp_path, train_file):
    done = run_recipe(parse_recipe(miniature_recipe(tmp_path / "run", train_file, bf16=bf16, max_steps=1)))
    folder, dtype = tmp_path / "run" / "student", torch.bfloat16 if bf16 else torch.float32
    file = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in file
    assert {value.dtype for value in file.values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    loaded, trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), done.model.eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(parameter.to(dtype))
        assert torch.equal(loaded(ids).logits, trained(ids).logits)


def test_a_generation_config_that_contradicts_itself_does_not_cost_the_student(tmp_path, train_file):
    lm = load_miniature("base")
    lm.model.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(
        '{"temperature": 0.9, "top_p": 0.6, "do_sample": false, "eos_token_id": 261}'
    )
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": str(tmp_path / "m")}, max_steps=1)
    run_recipe(parse_recipe(tree))
    saved = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [261]
    assert not {"temperature", "top_p"} & set(saved)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_a_generation_config_that_is_whole_is_kept():
    lm = load_miniature("base")
    lm.model.generation_config = GenerationConfig(temperature=0.9, do_sample=True, eos_token_id=261)
    assert generation_config(lm).to_diff_dict() | {"eos_token_id": [261]} == generation_config(lm).to_diff_dict()
    assert (generation_config(lm).temperature, generation_config(lm).do_sample) == (0.9, True)
