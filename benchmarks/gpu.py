"""What only a GPU can show: `python benchmarks/gpu.py costs OUT.json` and, by torchrun, `paths`. benchmarks/gpu.sh runs both.

`costs`: seconds and peak memory of one update of a student of 1.5B parameters, random weights, by this package and by plain
code (whole logits, log_softmax, autograd; every hidden state), each with the same AdamW, and the first loss of both.
`paths`: code that a CPU never runs, each with the value it must give. `--tiny` takes a tiny model, for a CPU.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

if importlib.util.find_spec("datasets") is None:  # no prompts are read here
    for name in ("datasets", "datasets.exceptions"):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(Dataset=object, load_dataset=None, DatasetsError=OSError)

from memory import peak_gib
from oprd.algorithm import Distillation
from oprd.clock import Clock, peak_memory_gib
from oprd.data.batching import split_by_tokens, student_batch
from oprd.distributed import Ranks
from oprd.effopd import EffOPDConfig, Extrapolation, Scores
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import LoraSection, ModelFacts, StudentConfig, load_frozen, load_student
from oprd.objectives import OPD, OPRD, OPDSampled, OPDTopK
from oprd.rollout.hf import HFEngine
from oprd.rollout.sources import StudentSource
from oprd.student import OptimizerSection, Student
from oprd.teacher.local import LocalTeacher
from oprd.train.checkpoint import load_checkpoint
from oprd.train.saving import Saving
from oprd.types import ALL_TOKENS, HiddenSpec, Message, Prompt, Rollouts, Taps

MINIATURE = Path(__file__).parents[1] / "src" / "oprd" / "demo" / "models"
SHAPE = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip
"""DeepSeek-R1-Distill-Qwen-1.5B, the paper's student."""
TINY = SHAPE | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512,
}  # fmt: skip
OBJECTIVES = {
    "oprd": OPRD(tokens=ALL_TOKENS), "opd": OPD(), "opd_top_16": OPDTopK(k=16, support="student"), "opd_sampled": OPDSampled(),
}  # fmt: skip
K, PROMPT = 16, 64
SECONDS = 420
"""After these nothing new is begun."""


def model_of(shape: dict[str, Any], seed: int, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Random weights, drawn where they stay."""
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape), dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "base")
    return LanguageModel(model=model, tokenizer=tokenizer, name=f"random weights {seed}")


def rollouts_of(shape: dict[str, Any], completions: int, longest: int) -> Rollouts:
    """Random tokens; the shortest completion has half the tokens of the longest."""
    draw = torch.Generator().manual_seed(0)
    lengths = [longest - i * longest // (2 * completions) for i in range(completions)]
    rows = [torch.randint(10, shape["vocab_size"], (PROMPT + n,), generator=draw).tolist() for n in lengths]
    turns = (Message(role="user", content=""),)
    prompts = [tuple(row[:PROMPT]) for row in rows]
    return Rollouts(
        prompts=tuple(Prompt(row=i, messages=turns, token_ids=p, teacher_token_ids=p) for i, p in enumerate(prompts)),
        completion_ids=tuple(tuple(row[PROMPT:]) for row in rows), finished=(True,) * completions,
    )  # fmt: skip


def ours(name: str, shape: dict[str, Any], accelerator: Accelerator, budget: int) -> Callable[[Rollouts], float]:
    """An update by this package, which gives its loss."""
    ranks, device = Ranks(accelerator), accelerator.device
    student, teacher = model_of(shape, 0, torch.float32, device), model_of(shape, 1, torch.bfloat16, device)
    teacher.model.eval().requires_grad_(False)
    objective = OBJECTIVES[name].bind(ModelFacts.read(student.model, student.tokenizer))
    method = Distillation(
        source=StudentSource(), teacher=LocalTeacher(FrozenModel(teacher), context=10**6), reference=None,
        student=Student(student, [objective], accelerator, OptimizerSection(warmup_ratio=0.0), 100), ranks=ranks,
        micro_batch_tokens=budget,
    )  # fmt: skip
    return lambda rollouts: method.update(rollouts, 1, Clock(device)).losses[0]


def plain(name: str, shape: dict[str, Any], accelerator: Accelerator, budget: int) -> Callable[[Rollouts], float]:
    """The same update as one writes it without this package."""
    device = accelerator.device
    student = model_of(shape, 0, torch.float32, device).model.train()
    teacher = model_of(shape, 1, torch.bfloat16, device).model.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)

    def losses(batch: Any) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs |= {"use_cache": False, "output_hidden_states": name == "oprd"}
        with torch.no_grad():
            theirs = teacher(**inputs)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            own = student(**inputs)
        at = batch.positions(ALL_TOKENS, shift=int(name != "oprd"))
        if name == "oprd":
            pairs = zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True)
            return torch.stack(
                [(a.flatten(0, 1)[at].float() - b.flatten(0, 1)[at]).square().mean(-1) for a, b in pairs]
            ).mean(0)
        p, q = (out.logits.flatten(0, 1)[at].float() for out in (own, theirs))
        if name == "opd_top_16":
            index = p.topk(K).indices
            p, q = p.gather(1, index), q.gather(1, index)
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        if name == "opd_sampled":
            ids = batch.sampled_ids(ALL_TOKENS)[:, None]
            p, q = p.gather(1, ids)[:, 0], q.gather(1, ids)[:, 0]
            return (p - q).detach() * (1 + p - p.detach())  # the value of the loss, the gradient of the score
        return (p.exp() * (p - q)).sum(-1)

    def update(rollouts: Rollouts) -> float:
        total, tokens = 0.0, sum(rollouts.lengths)
        for micro in split_by_tokens(rollouts, budget):
            loss = losses(student_batch(micro, pad_id=0, device=device)).sum() / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return update


def costs(tiny: bool) -> dict[str, Any]:
    """Of each objective, ours and plain: first loss, seconds of the best of two updates, GiB above the state at rest."""
    shape, bf16 = (TINY, False) if tiny else (SHAPE, True)
    accelerator, start, found = (
        Accelerator(mixed_precision="bf16" if bf16 else "no"),
        time.monotonic(),
        dict[str, Any](),
    )
    rollouts, budget = rollouts_of(shape, 8, 64 if tiny else 1984), 256 if tiny else 4096
    for name in OBJECTIVES:
        for how in (ours, plain):
            if time.monotonic() - start > SECONDS:
                continue
            update, seconds = how(name, shape, accelerator, budget), []
            loss = update(rollouts)  # the optimizer's moments are there afterwards
            for _ in range(2):
                begin = time.perf_counter()
                update(rollouts)
                seconds.append(time.perf_counter() - begin)
            found[f"{name} {how.__name__}"] = {
                "first_loss": loss, "seconds": min(seconds), "peak_gib": peak_gib(lambda update=update: update(rollouts)),
            }  # fmt: skip
            print(f"{name} {how.__name__}", found[f"{name} {how.__name__}"], flush=True)
            del update
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return {"shape": shape, "tokens": sum(rollouts.lengths), "micro_batch_tokens": budget, "arms": found}


def miniature(name: str, dtype: torch.dtype, device: torch.device, **held: Any) -> FrozenModel:
    return load_frozen(
        str(MINIATURE / name), AutoTokenizer.from_pretrained(MINIATURE / name), device, dtype=dtype, **held
    )


def last_states(model: FrozenModel, rollouts: Rollouts) -> torch.Tensor:
    spec = HiddenSpec(block="last", at="token", tokens=ALL_TOKENS)
    batch = student_batch(rollouts, pad_id=model.lm.pad_id, device=model.lm.device)
    return model.hidden(batch, Taps(hidden=(spec,), head=True)).hidden[spec].float().cpu()


def equal_seeds_give_equal_tokens(accelerator: Accelerator) -> None:
    model = miniature("base", torch.float32, accelerator.device)
    engine, sampling = HFEngine(model), Sampling(temperature=1.0, max_new_tokens=32, samples=4)
    asked = tuple(replace(p, token_ids=p.token_ids[:8]) for p in rollouts_of(TINY | {"vocab_size": 200}, 4, 8).prompts)
    before = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()
    one, again, other = (engine.generate(asked, sampling, seed=seed).completion_ids for seed in (1, 1, 2))
    after = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()
    assert one == again != other
    assert torch.equal(before, after), "the run's own random state has moved"


def memory_is_counted(accelerator: Accelerator) -> None:
    held = torch.zeros(2**26, device=accelerator.device)
    assert peak_memory_gib(accelerator.device) >= held.nbytes / 2**30


def a_teacher_in_bfloat16_is_near_the_whole_one(accelerator: Accelerator) -> None:
    rollouts, device = rollouts_of(TINY | {"vocab_size": 200}, 4, 32), accelerator.device
    whole = last_states(miniature("teacher", torch.float32, torch.device("cpu")), rollouts)
    low, waiting = (
        last_states(miniature("teacher", torch.bfloat16, device, **held), rollouts)
        for held in ({}, {"held": "in CPU memory"})
    )
    assert float((low - whole).norm() / whole.norm()) < 0.05
    assert torch.equal(low, waiting)


def a_checkpoint_goes_on_bit_for_bit(accelerator: Accelerator) -> None:
    ranks, rollouts = Ranks(accelerator), rollouts_of(TINY | {"vocab_size": 200}, 4, 32)
    for options in ({}, {"weights": "bfloat16"}, {"lora": LoraSection(r=4)}, {"gradient_checkpointing": "offload"}):
        methods = []
        for _ in range(2):
            config = StudentConfig(model=str(MINIATURE / "base"), **options)
            teacher = miniature("teacher", torch.float32, accelerator.device)
            lm = replace(teacher.lm, model=load_student(config), name="student")
            if config.gradient_checkpointing:
                lm.recompute_blocks(offload=True)
            objective = OPRD(tokens=ALL_TOKENS).bind(ModelFacts.read(lm.model, lm.tokenizer))
            student = Student(lm, [objective], accelerator, OptimizerSection(learning_rate=1e-3, warmup_ratio=0.0), 10)
            methods.append(Distillation(
                source=StudentSource(), teacher=LocalTeacher(teacher, context=10**6), reference=None, student=student,
                ranks=ranks, micro_batch_tokens=64,
            ))  # fmt: skip
        first, resumed = methods
        with tempfile.TemporaryDirectory() as folder:
            first.update(rollouts, 1, Clock(ranks.device))
            saving = Saving(Path(folder), first.student, ranks, every=1, keep=1)
            saving.begin(1, dict, {})
            saving.finish()
            first.update(rollouts, 2, Clock(ranks.device))
            load_checkpoint(Path(folder) / "step-000001", resumed.student, ranks, tensors={})
            resumed.update(rollouts, 2, Clock(ranks.device))
        ours, theirs = first.student.weights(), resumed.student.weights()
        assert all(float((x - theirs[key]).abs().max()) < 1e-6 for key, x in ours.items()), options


def ranks_add_up(accelerator: Accelerator) -> None:
    """By NCCL under torchrun on a GPU."""
    ranks = Ranks(accelerator)
    assert ranks.sum([1 / 3, 2.0**40 + 2**-12]) == [ranks.size / 3, ranks.size * (2.0**40 + 2**-12)], "float64"
    assert ranks.max(3.0) == 3.0
    assert ranks.gather_objects([{"rank": ranks.rank}]) == [{"rank": i} for i in range(ranks.size)]
    ranks.wait()


def decompositions_agree(accelerator: Accelerator) -> None:
    """What the bridge solves by, in float64."""
    a = torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = a.to(accelerator.device)
    for ours, theirs in (
        (torch.linalg.eigvalsh(here.T @ here), torch.linalg.eigvalsh(a.T @ a)),
        (torch.linalg.svdvals(here), torch.linalg.svdvals(a)),
    ):
        assert float((ours.cpu() - theirs).abs().max() / theirs.abs().max()) < 1e-12
    values, vectors = torch.linalg.eigh(here.T @ here)
    assert float((vectors * values @ vectors.T - here.T @ here).abs().max()) < 1e-9


def extrapolation_moves_weights(accelerator: Accelerator) -> None:
    lm = replace(miniature("base", torch.float32, accelerator.device).lm)
    lm.model.requires_grad_(True)
    config = EffOPDConfig(every=1, validation_prompts=8, score="objective", accept="better")
    search = Extrapolation(config, lm, Ranks(accelerator), lambda: None)
    weight = lm.blocks[0].mlp.down_proj.weight
    start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.01)
    scores = iter([0.0, 1.0, *[0.0] * 20])
    found = search.after_update(1, lambda: Scores(values=(next(scores),) * 8, tokens=0))
    assert found is not None
    assert torch.allclose(weight, start + 0.01 * (1 + found["accepted"]), atol=1e-6)


PATHS = (
    equal_seeds_give_equal_tokens, memory_is_counted, a_teacher_in_bfloat16_is_near_the_whole_one,
    a_checkpoint_goes_on_bit_for_bit, ranks_add_up, decompositions_agree, extrapolation_moves_weights,
)  # fmt: skip


def paths() -> dict[str, str]:
    """What each gives: `right`, or its error."""
    accelerator, found = Accelerator(), dict[str, str]()
    for path in PATHS:
        try:
            path(accelerator)
            found[path.__name__] = "right"
        except Exception as error:
            found[path.__name__] = f"{type(error).__name__}: {error}"
        print(path.__name__, found[path.__name__], flush=True)
    return found | {"process group": torch.distributed.get_backend() if torch.distributed.is_initialized() else "none"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("costs", "paths"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    found = costs(args.tiny) if args.what == "costs" else paths()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"gpu": gpu, "torch": torch.__version__, "seconds": round(time.monotonic() - start, 1)}
    args.out.write_text(json.dumps({args.what: found, "machine": machine}, indent=1) + "\n")
    return int(args.what == "paths" and any(value.count(": ") for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
