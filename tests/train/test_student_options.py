"""Options for students of real size change what a step costs, not what it learns."""

import gc
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.data.batching import student_batch
from oprd.errors import ConfigError
from oprd.models.language_model import FrozenModel
from oprd.models.loading import load_frozen
from oprd.recipe import parse_recipe
from oprd.student import _rounded_at_random
from oprd.train.checkpoint import load_checkpoint
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import ALL_TOKENS, HiddenSpec, Taps
from train.runs import (
    assert_same_weights,
    rollouts_of,
    save_checkpoint,
    update,
    weights,
    weights_after,
)

pytestmark = pytest.mark.slow

BASE = str(MODELS / "base")
SAMPLED = {"type": "opd_sampled"}


def parts_of(folder: Path, train_file: Path, student: dict[str, Any], **changes: Any):
    tree = miniature_recipe(folder, train_file, student={"model": BASE} | student, health_tokens=0, **changes)
    return setup(parse_recipe(tree))


def test_rounding_at_random_keeps_the_mean_and_exact_numbers():
    step = 2.0**-7  # between two bfloat16 numbers at 1
    for number, low in ((1 + 0.1 * step, 1.0), (-1 - 0.9 * step, -1 - step)):
        drawn = _rounded_at_random(torch.full((200_000,), number), seed=0).float()
        assert set(drawn.tolist()) == {low, low + step}
        assert float(drawn.mean()) == pytest.approx(number, abs=5 * step * 0.3 / 200_000**0.5)
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(_rounded_at_random(exact.float(), seed=1), exact)


def test_small_updates_of_bfloat16_weights_do_not_vanish(tmp_path, train_file):
    """Regressed on the update of float32 weights, the update has slope 1; rounded to the nearest, it has about 0.1."""
    start = load_miniature("base").model.state_dict()
    start = {name: value.to(torch.bfloat16).float() for name, value in start.items()}
    moved = []
    for held in ("float32", "bfloat16"):
        parts = parts_of(
            tmp_path / held, train_file, {"weights": held}, learning_rate=1e-5, lr_scheduler_type="constant"
        )
        with torch.no_grad():
            for name, parameter in parts.method.student.lm.model.named_parameters():
                parameter.copy_(start[name])
        for _ in range(3):
            update(parts)
        moved.append(torch.cat([(x.float() - start[name]).flatten() for name, x in weights(parts).items()]))
        dtypes = {p.dtype for p in parts.method.student.lm.model.parameters()}
        assert dtypes == {getattr(torch, held)}
    assert {x.dtype for x in parts.method.student.optimizer.state_dict()["state"][0].values()} == {torch.float32}
    whole, rounded = moved
    assert float(whole @ rounded / (whole @ whole)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("options", [{"optim": "adamw_8bit"}, {"student": {"model": BASE, "weights": "bfloat16"}}])
def test_a_resumed_student_goes_on_as_if_it_had_not_stopped(options, tmp_path, train_file):
    """Its moments and the draws of its rounding are those of a student that was not stopped, bit for bit."""
    tree = miniature_recipe(tmp_path / "run", train_file, health_tokens=0) | options
    first, resumed = (setup(parse_recipe(tree)) for _ in range(2))
    for _ in range(2):
        update(first)
    save_checkpoint(tmp_path, 2, first.method.student, first.ranks)
    update(first)
    load_checkpoint(tmp_path / "step-000002", resumed.method.student, resumed.ranks, tensors={})
    assert any(not torch.equal(x, weights(first)[name]) for name, x in weights(resumed).items())
    update(resumed)
    assert_same_weights(weights(resumed), weights(first), atol=0)


def test_moments_in_8_bits_make_nearly_the_same_updates(tmp_path, train_file):
    start = load_miniature("base").model.state_dict()
    one, other = (
        weights_after(tmp_path / optim, train_file, steps=(1, 1, 1), optim=optim)
        for optim in ("adamw_torch", "adamw_8bit")
    )
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(one[name] - other[name]).flatten() for name in start])
    assert 0 < float(apart.abs().mean() / moved.abs().mean()) < 0.05


def test_a_4_bit_base_gives_the_losses_of_its_dequantized_weights(tmp_path, train_file):
    lora = {"lora": {"r": 4, "alpha": 8}}
    quantized = parts_of(tmp_path / "4bit", train_file, lora | {"weights": "4bit"})
    plain = parts_of(tmp_path / "plain", train_file, lora | {"weights": "bfloat16"})
    (ours, theirs) = (parts.method.student.lm.model for parts in (quantized, plain))
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 7 * plain.method.student.lm.num_blocks
    for name, layer in layers.items():
        theirs.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    gradients = []
    for parts in (quantized, plain):
        method, rollouts = parts.method, rollouts_of(parts)
        losses = method.student.losses(method.batch(rollouts), method.targets(rollouts))
        losses[0].sum().backward()
        found = [p.grad.flatten() for name, p in method.student.lm.model.named_parameters() if "lora_B" in name]
        gradients.append((losses[0].detach().float(), torch.cat(found)))
    assert_close(gradients[0][0], gradients[1][0], rtol=0.1, atol=1e-2)
    assert float(torch.cosine_similarity(gradients[0][1], gradients[1][1], dim=0)) > 0.99


def test_the_adapter_of_a_4_bit_base_is_saved_and_loads_on_the_whole_base(tmp_path, train_file):
    student = {"model": BASE, "lora": {"r": 4, "alpha": 8}, "weights": "4bit"}
    done = run_recipe(parse_recipe(miniature_recipe(tmp_path / "run", train_file, student=student, max_steps=1)))
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "student")
    trained = {n: p for n, p in done.model.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert torch.equal(parameter.detach(), loaded.get_parameter(name).detach()), name


def test_offloaded_block_inputs_alone_go_to_cpu_memory_and_change_nothing(tmp_path, train_file, monkeypatch):
    """On a CPU nothing moves, so a copy stands for the move."""
    moved: list[torch.Size] = []
    copies = partial(saved_tensors_hooks, lambda x: moved.append(x.shape) or x.clone(), lambda x: x)
    monkeypatch.setattr("oprd.models.language_model.save_on_cpu", lambda pin_memory: copies())
    kept, after = {}, {}
    for how in (True, "offload"):
        parts = parts_of(tmp_path / str(how), train_file, {"gradient_checkpointing": how}, objective=SAMPLED)
        method, rollouts, seen = parts.method, rollouts_of(parts), []
        blocks, batch = method.student.lm.blocks, method.batch(rollouts)
        hook = blocks[1].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(weakref.ref(args[0])))
        moved.clear()
        losses = method.student.losses(batch, method.targets(rollouts))
        gc.collect()
        kept[how] = seen[0]() is not None
        states = [
            shape for shape in moved if shape == (*batch.input_ids.shape, method.student.lm.core.config.hidden_size)
        ]
        assert len(states) == (len(blocks) if how == "offload" else 0)
        hook.remove()
        del losses
        update(parts, rollouts)
        after[how] = weights(parts)
    assert kept == {True: True, "offload": False}
    assert_same_weights(after[True], after["offload"], atol=0)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_blocks_are_compiled_together_and_make_the_same_updates(tmp_path, train_file, monkeypatch):
    """Without the C++ compiler, which would take minutes."""
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    )
    compiled, plain = (
        weights_after(tmp_path / str(on), train_file, student={"model": BASE, "torch_compile": on})
        for on in (True, False)
    )
    assert 0 < len(graphs) <= 4, "each of the four blocks has parts of its own"
    assert_same_weights(compiled, plain, atol=1e-6)


def test_an_offloaded_teacher_computes_elsewhere_and_its_weights_stay_at_home(tmp_path, train_file):
    parts, lm = parts_of(tmp_path / "run", train_file, {}), load_miniature("teacher")
    rollouts, spec = rollouts_of(parts), HiddenSpec(block="last", at="token", tokens=ALL_TOKENS)
    cpu, taps = torch.device("cpu"), Taps(hidden=(spec,), head=True)
    batch = student_batch(rollouts, pad_id=lm.pad_id, device=cpu)
    own = FrozenModel(lm).hidden(batch, taps)
    here = load_frozen(str(MODELS / "teacher"), lm.tokenizer, cpu, dtype=torch.float32, held="in CPU memory")
    states = here.hidden(batch, taps)
    assert torch.equal(states.hidden[spec], own.hidden[spec])
    assert torch.equal(states.head.weight, own.head.weight)
    home = [x.data_ptr() for x in here.lm.model.state_dict(keep_vars=True).values()]
    with here.in_place():  # the CPU stands for the GPU: weights are copied to it all the same
        assert not set(home) & {x.data_ptr() for x in here.lm.model.state_dict(keep_vars=True).values()}
    assert [x.data_ptr() for x in here.lm.model.state_dict(keep_vars=True).values()] == home


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": {"model": BASE, "weights": "4bit"}}, "student.weights is '4bit', .* set student.lora, or use bfloat16"),
        (
            {"student": {"model": BASE, "lora": {}, "weights": "4bit"}, "rollout": {"engine": {"type": "vllm"}}},
            "'4bit', but rollout.engine 'vllm' loads the whole base model; use bfloat16, or another engine",
        ),
        ({"student": {"model": BASE, "weights": "bfloat16"}, "bf16": False}, "bf16 is false, but .* drop bf16, or use float32"),
        ({"teacher": {"type": "local", "model": BASE, "offload": True}}, r"teacher.offload .*\(here: on cpu, quantization None\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_loading(changes, says, tmp_path, train_file, monkeypatch):
    monkeypatch.setattr("oprd.train.setup.load_student", lambda *_, **__: pytest.fail("loads"))
    with pytest.raises(ConfigError, match=says):
        setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim": "adamw_8bit"}, "optim 'adamw_8bit' needs bitsandbytes"),
        ({"student": {"model": BASE, "lora": {}, "weights": "4bit"}}, "student.weights '4bit' needs bitsandbytes"),
        (
            {"teacher": {"type": "local", "model": BASE, "quantization": "8bit"}},
            "teacher.quantization needs bitsandbytes",
        ),
        ({"student": {"model": BASE, "torch_compile": True}}, "torch_compile needs a C.. compiler, and there is no g"),
    ],
)
def test_a_missing_library_is_named_before_loading(changes, says, tmp_path, train_file, monkeypatch):
    monkeypatch.setattr("oprd.models.quantization.find_spec", lambda _: None)
    monkeypatch.setattr("oprd.models.loading.shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=says):
        setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file) | changes))


def test_a_run_without_adapters_and_low_bits_imports_nothing_for_them(tmp_path, train_file):
    """They take seconds of every start."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(miniature_recipe(tmp_path / "run", train_file, max_steps=1)))
    code = (
        "import sys; from oprd.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print('imported', *{'peft', 'bitsandbytes'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "run" / "result.json").is_file(), done.stderr
    assert done.stdout.splitlines()[-1] == "imported"
