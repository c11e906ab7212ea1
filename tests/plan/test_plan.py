"""A plan against the memory that the same step takes, and what the command says."""

import dataclasses
import gc
import itertools

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import MODELS, miniature_recipe
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from oprd.cli import app
from oprd.clock import Clock
from oprd.data.batching import rows_by_tokens
from oprd.distributed import Ranks
from oprd.errors import ConfigError, DoesNotFit
from oprd.models import language_model
from oprd.plan import start
from oprd.plan.meter import Meter
from oprd.plan.plan import Place, find_device, largest_budget, plan_checked, plan_recipe
from oprd.plan.simulate import FROZEN, GRADIENTS, OPTIMIZER, WEIGHTS, alone, fill_optimizer, load, longest_step
from oprd.plan.start import UNCHECKED, at_most
from oprd.recipe import parse_recipe, recipe_to_dict, recipe_to_yaml
from oprd.student import InitialStudent
from oprd.train.accelerator import open_accelerator
from oprd.train.pair import Given
from oprd.train.run import run_recipe
from oprd.train.setup import check

pytestmark = pytest.mark.slow

SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
CASES = {
    "oprd": {},
    "last block": {"objective": {"type": "oprd", "layers": "last", "tokens": "all"}},
    "opd": {"objective": {"type": "opd"}},
    "jsd": {"objective": {"type": "opd", "divergence": "jsd"}},
    "top k": {"objective": {"type": "opd_top_k", "k": 16}},
    "sampled": {"objective": {"type": "opd_sampled"}},
    "sum": {"objective": [{"type": "oprd", "tokens": {"last": 100}}, {"type": "opd_sampled"}]},
    "ride": {"objective": {"type": "ride", "tokens": "all"}},
    "recomputed": {"student": {"model": "", "gradient_checkpointing": True}},
    "offloaded": {"student": {"model": "", "gradient_checkpointing": "offload"}},
    "lora": {"student": {"model": "", "lora": {"r": 8}}},
    "bf16": {"bf16": True},
    "4 bits": {"bf16": True, "student": {"model": "", "lora": {"r": 8}, "weights": "4bit"}},
    "packed": {"packing": True},
    "self": {"objective": {"type": "opd"}, "teacher": {"type": "self", "prompt_template": "{problem}="}},
    "sequence": {
        "objective": {"type": "nll"},
        "rollout": {"source": {"type": "teacher"}, "max_completion_length": 200},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tensors are large beside what a kernel needs for itself."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "base").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe_of(model, tmp_path, train_file):
    def recipe(**changes):
        tree = miniature_recipe(
            tmp_path / "run",
            train_file,
            teacher={"type": "local", "model": model, "dtype": "float32"},
            rollout={"group_size": 2, "max_completion_length": 200},
            micro_batch_tokens=900,
            bf16=False,
        )
        tree |= changes
        tree["student"] = dict(tree["student"]) | {"model": model}
        return parse_recipe(tree)

    return recipe


def storages():
    """Bytes of every tensor's storage, by address."""
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}


def measured_peak(recipe):
    """Bytes that tensors hold at most during an update of the longest step, by torch's profiler."""
    accelerator = open_accelerator(recipe)
    checked = check(recipe, Given(), Ranks(accelerator), InitialStudent())
    gc.collect()
    earlier = storages()
    method = load(recipe, checked, accelerator, Meter())
    fill_optimizer(method.student)
    step = longest_step(recipe, checked, method.student, 1)
    micros = rows_by_tokens(step, recipe.micro_batch_tokens, packed=method.student.lm.packs)
    some = step.take([row for rows in micros[:2] for row in rows])
    gc.collect()
    before = sum(size for at, size in storages().items() if at not in earlier)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method.update(some, 1, Clock(accelerator.device))
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    return before + max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("name", CASES)
def test_the_update_takes_the_memory_that_is_planned(name, recipe_of, monkeypatch):
    """What is offloaded waits in memory that the profiler does not see, as that beside a GPU."""
    recipe = recipe_of(**CASES[name])
    with alone(bf16=False) as accelerator:
        checked = check(recipe, Given(), Ranks(accelerator), InitialStudent())
    plan = plan_checked(recipe, checked, Place(device=find_device("h100")))
    planned = plan.parts["update"].total()
    away = saved_tensors_hooks(lambda x: x.numpy().copy(), torch.tensor)
    monkeypatch.setattr(language_model, "save_on_cpu", lambda **_: away)
    measured = measured_peak(recipe)
    print(f"{name}: planned {planned / 1e6:.2f} MB, {planned / measured:.4f} of what was measured")
    assert planned == pytest.approx(measured, rel=0.05)
    assert plan.peak_gb * 1e9 < at_most(recipe, checked) < 30 * plan.peak_gb * 1e9


def test_a_teacher_that_waits_in_cpu_memory_or_is_on_another_device_takes_none_of_this_one(recipe_of, model):
    teacher = {"type": "local", "model": model, "dtype": "float32"}
    plans = [
        plan_recipe(recipe_of(teacher=teacher | where), Place(device=find_device("24"))).parts["update"]
        for where in ({}, {"offload": True}, {"device": "cuda:1"}, {"device": "cuda:0"})
    ]
    weights = 4 * sum(x.numel() for x in AutoModelForCausalLM.from_pretrained(model).parameters())
    here, *apart, same = plans
    assert same == here
    assert here[FROZEN] == pytest.approx(weights, rel=1e-3)
    for parts in apart:
        assert parts[FROZEN] == 0
        assert (here - parts).total() == pytest.approx(weights, rel=1e-2)


def test_sharding_divides_what_the_student_holds(recipe_of):
    place = Place(device=find_device("24"), processes=4, sharded=True)
    whole = plan_recipe(recipe_of(prompts_per_step=8), Place(device=find_device("24"), processes=4)).parts["update"]
    parts = plan_recipe(recipe_of(prompts_per_step=8), place).parts["update"]
    trained = whole[WEIGHTS]  # DDP holds all gradients at any time
    assert whole[GRADIENTS] == pytest.approx(trained, rel=1e-3)
    assert parts[GRADIENTS] < trained / 4
    assert [parts[name] for name in (WEIGHTS, OPTIMIZER)] == [whole[name] // 4 for name in (WEIGHTS, OPTIMIZER)]
    assert "gathered weights" in parts


def test_the_largest_budget_fits_and_one_completion_more_does_not(recipe_of):
    small = dataclasses.replace(find_device("24"), memory_gb=0.18, reserved_gb=0)
    plan = plan_recipe(recipe_of(), Place(device=small))
    budget, longest = largest_budget(recipe_of(), plan), plan.simulated.longest
    assert 1 < budget // longest < 8

    def held(rows):
        recipe = recipe_of(micro_batch_tokens=rows * longest)
        return plan_recipe(recipe, Place(device=small)).parts["update"].total() / 1e9

    assert held(budget // longest) <= small.memory_gb < held(budget // longest + 1)


def test_the_command_says_what_would_help(recipe_of, tmp_path, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_to_yaml(recipe_of(objective={"type": "opd"})))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("a folder that training would refuse")
    done = CliRunner().invoke(app, ["plan", str(recipe), "--device", "1.65"])
    assert done.exit_code == 0, done.output
    assert "does not fit" in done.output
    assert "micro_batch_tokens=" in done.output
    assert "largest micro_batch_tokens that fits" in done.output


@pytest.mark.slow
def test_training_refuses_what_cannot_fit_before_it_loads_weights(recipe_of, model, tmp_path):
    """A teacher of 3 TB, whose file lacks all weights."""
    large = tmp_path / "large"
    LlamaConfig(**SHAPE | {"hidden_size": 2**16, "intermediate_size": 3 * 2**16}).save_pretrained(large)
    AutoTokenizer.from_pretrained(model).save_pretrained(large)
    save_file({"none": torch.zeros(1)}, large / "model.safetensors", metadata={"format": "pt"})
    tree = recipe_to_dict(recipe_of(objective={"type": "opd"}))
    tree["teacher"]["model"] = str(large)
    with pytest.raises(DoesNotFit) as refused:
        run_recipe(parse_recipe(tree))
    for told in (
        "frozen models",
        "cpu (what is free now): does not fit",
        "teacher.dtype=bfloat16",
        f"set {UNCHECKED}=1",
    ):
        assert told in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_starts_all_the_same_where_the_user_says_so(recipe_of, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_free_bytes", lambda _: 1e7)
    recipe = recipe_of(max_steps=1, health_tokens=0, rollout={"group_size": 1, "max_completion_length": 2})
    monkeypatch.setenv(UNCHECKED, "1")
    assert run_recipe(recipe).result.steps == 1


def test_an_unknown_device_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"no device 'h1000'; known are h100, .*, or give its memory in GB"):
        find_device("h1000")
    assert find_device("H100").memory_gb == 80
