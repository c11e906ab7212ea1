"""Students that are adapters: a trained one goes on as it is, "before training" is its own start, and the rest is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.distributed import Ranks
from oprd.errors import ConfigError, ModelError, OprdError
from oprd.recipe import parse_recipe
from oprd.student import InitialStudent
from oprd.train.fit_bridge import fit_bridge
from oprd.train.pair import Given
from oprd.train.run import distill, run_recipe
from oprd.train.setup import check, open_accelerator, setup
from train.runs import metrics, rollouts_of

pytestmark = pytest.mark.slow

LORA = {"model": str(MODELS / "base"), "lora": {"r": 4}}
SELF = {"teacher": {"type": "self", "prompt_template": "{problem}"}, "objective": {"type": "opd"}}


@pytest.fixture(scope="module")
def first(tmp_path_factory, train_file):
    """The student of a LoRA run, trained away from its base."""
    folder = tmp_path_factory.mktemp("first")
    run_recipe(
        parse_recipe(miniature_recipe(folder / "run", train_file, student=LORA, max_steps=3, learning_rate=1e-2))
    )
    return folder / "run" / "student"


def kl_to_itself(folder, train_file, student, **changes):
    """(parts, KL(student || itself before training) of every token as a function of the weights in place)."""
    parts = setup(parse_recipe(miniature_recipe(folder, train_file, student=student, **(SELF | changes))))
    micro = rollouts_of(parts)
    method = parts.method
    return parts, lambda: method.student.evaluate(method.batch(micro), method.targets(micro))[0]


def test_an_adapters_folder_is_trained_on_as_it_is(first, tmp_path, train_file):
    before = load_file(first / "adapter_model.safetensors")
    assert any(float(w.abs().max()) > 0 for name, w in before.items() if "lora_B" in name)
    tree = miniature_recipe(
        tmp_path / "run", train_file, student={"model": str(first)}, max_steps=1, learning_rate=1e-6
    )
    run_recipe(parse_recipe(tree))
    after = load_file(tmp_path / "run" / "student" / "adapter_model.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert 0 < max(moved.values()) < 2e-6
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "base", train_file, student=LORA, max_steps=1)))
    (ours,), (fresh,) = metrics(tmp_path / "run"), metrics(tmp_path / "base")
    assert ours["train/oprd/mean"] < 0.95 * fresh["train/oprd/mean"]  # it went on where the first run ended


def test_a_saved_adapter_gives_the_logits_it_was_trained_to(tmp_path, train_file):
    done = run_recipe(
        parse_recipe(miniature_recipe(tmp_path / "run", train_file, student=LORA, max_steps=1, bf16=True))
    )
    base = AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32)
    loaded, ids = PeftModel.from_pretrained(base, tmp_path / "run" / "student").eval(), torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, done.model.eval()(ids).logits)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trained_adapter_agrees_with_itself_before_training(bf16, first, tmp_path, train_file):
    parts, kl = kl_to_itself(tmp_path / "run", train_file, {"model": str(first)}, bf16=bf16)
    assert float(kl().abs().max()) < 1e-6
    with torch.no_grad():
        weights = [p for p in parts.method.student.lm.model.parameters() if p.requires_grad]
        for parameter in weights:
            parameter.add_(0.05)
    after = [p.clone() for p in weights]
    assert float(kl().mean()) > 1e-2
    assert all(torch.equal(p, kept) for p, kept in zip(weights, after, strict=True))


def test_an_adapter_may_be_given_without_a_tokenizer_of_its_own(first, tmp_path, train_file):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((first / name).read_bytes())
    setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, student={"model": str(tmp_path)})))


def test_a_fresh_adapter_on_an_adapter_is_refused_before_loading(first, tmp_path, train_file, monkeypatch):
    monkeypatch.setattr("oprd.models.loading.load_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": str(first), "lora": {"r": 4}})
    bridge = {"objective": {"type": "oprd_bridge", "bridge": str(tmp_path / "b.safetensors")}}
    for start in (lambda: setup(parse_recipe(tree)), lambda: fit_bridge(parse_recipe(tree | bridge))):
        with pytest.raises(ConfigError, match=r"student\.lora asks for a fresh adapter, but .* is an adapter already"):
            start()
    given = Given(student=get_peft_model(load_miniature("base").model, LoraConfig(target_modules="all-linear")))
    with pytest.raises(ConfigError, match="is an adapter already"):
        setup(parse_recipe(tree | {"student": LORA}), given)


def test_an_object_that_nothing_of_can_be_trained_is_refused(first, tmp_path, train_file):
    base, tree = load_miniature("base").model, miniature_recipe(tmp_path / "run", train_file)
    frozen = PeftModel.from_pretrained(base, first)  # is_trainable=False, as for inference
    inside = AutoModelForCausalLM.from_pretrained(first)
    for model, why in ((frozen, "is_trainable=True"), (inside, "adapter that transformers loaded")):
        with pytest.raises(ModelError, match=why):
            setup(parse_recipe(tree), Given(student=model))


def test_one_model_as_student_and_teacher_is_refused(tmp_path, train_file):
    lm = load_miniature("base")
    adapted = get_peft_model(load_miniature("base").model, LoraConfig(target_modules="all-linear"))
    for student, teacher in ((lm.model, lm.model), (adapted, adapted.get_base_model())):
        with pytest.raises(OprdError, match="share weights"):
            distill(
                student=student, teacher=teacher, prompts=train_file, output_dir=tmp_path / "run",
                given=Given(tokenizer=lm.tokenizer),
            )  # fmt: skip
        assert any(p.requires_grad for p in student.parameters())


def test_a_seed_draws_the_same_adapter_whatever_was_drawn_before(tmp_path, train_file):
    for name in ("one", "two"):
        torch.rand(7)
        run_recipe(parse_recipe(miniature_recipe(tmp_path / name, train_file, student=LORA, max_steps=2)))
    assert json.dumps(metrics(tmp_path / "one")) == json.dumps(metrics(tmp_path / "two"))


@pytest.mark.parametrize("kind", ["several", "anchor"])
def test_passes_of_an_adapter_that_ranks_would_make_unevenly_are_refused_before_loading(kind, tmp_path, train_file):
    teacher = {"type": "self", "prompt_template": "{problem}="}
    local = {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"}
    parts = {
        "several": {
            "teacher": {"type": "several", "teachers": {"a": teacher, "b": local}},
            "objective": {"type": "opd"},
        },
        "anchor": {"teacher": local, "objective": {"type": "omni_opd", "chunk_tokens": 5}},
    }[kind]
    recipe = parse_recipe(miniature_recipe(tmp_path / "run", train_file, student=LORA, **parts))
    ranks = Ranks(open_accelerator(recipe))
    ranks.sharded = True
    with pytest.raises(ConfigError, match="another number of forward passes on each rank"):
        check(recipe, Given(), ranks, InitialStudent())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_student_of_full_weights_agrees_with_itself_before_training(bf16, tmp_path, train_file):
    """Under bf16 the frozen copy computes as the student does."""
    _, kl = kl_to_itself(tmp_path / "run", train_file, {"model": str(MODELS / "base")}, bf16=bf16)
    assert float(kl().abs().max()) == 0.0
