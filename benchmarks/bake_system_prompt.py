"""How much of a system prompt OPRD and OPD put into the weights: recipes/bake_system_prompt.yaml.

Measured before and after on held-out prompts: KL(student || prompted teacher) per token of fresh student completions,
sampled (log p - log q) and exact over the vocabulary at the same positions, with a 95% bootstrap interval over prompts.

    python scripts/export_smollm2.py runs/smollm2 && python benchmarks/bake_system_prompt.py
"""

import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oprd.data.chat import render, with_prompt
from oprd.data.prompts import load_prompts
from oprd.evaluate.metrics import bootstrap_interval
from oprd.losses.chunked import logits
from oprd.losses.divergences import reverse_kl, token_logprobs
from oprd.models.generate import Sampling
from oprd.recipe import load_recipe
from oprd.train.loop import train
from oprd.train.run_folder import describe_machine
from oprd.train.setup import Parts, setup
from oprd.types import ALL_TOKENS, HiddenSpec, HiddenStates, Prompt, Taps

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "bake_system_prompt.yaml"
HELD_OUT = ROOT / "recipes" / "bake_held_out.jsonl"
SAMPLES, BATCH = 2, 16
VARIANTS = {"oprd": "{type: oprd, tokens: all}", "opd": "{type: opd}"}
TAPS = Taps(hidden=(HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS),), head=True)


def held_out(parts: Parts) -> list[Prompt]:
    """The held-out prompts, for the student and with the system prompt for the teacher."""
    tokenizer, system_prompt = parts.method.student.lm.tokenizer, parts.recipe.teacher.system_prompt
    prompts = load_prompts(type(parts.recipe.data)(prompts=str(HELD_OUT)), tokenizer, context=2048, room=40)
    messages = [with_prompt(prompt.messages, prompt.columns, system_prompt, None) for prompt in prompts]
    return [
        replace(prompt, teacher_messages=turns, teacher_token_ids=render(tokenizer, turns))
        for prompt, turns in zip(prompts, messages, strict=True)
    ]


def measure(parts: Parts) -> dict[str, list[float]]:
    """Mean per-token KL to the prompted teacher on the student's completions of the held-out prompts, in nats."""
    method, sampling = parts.method, Sampling(temperature=1.0, max_new_tokens=40, samples=SAMPLES)
    with parts.engine.session():
        rollouts = parts.engine.generate(held_out(parts), sampling, seed=7)
    sampled, exact = [], []
    for start in range(0, len(rollouts), BATCH):
        some = rollouts.take(range(start, min(start + BATCH, len(rollouts))))
        batch, teacher = method.batch(some), method.teacher.targets(some, TAPS).teacher
        assert teacher is not None
        p, q = all_logits(method.student.hidden(batch, TAPS)), all_logits(teacher)
        ids = batch.sampled_ids(ALL_TOKENS)
        sampled += (token_logprobs(p, ids) - token_logprobs(q, ids)).split(some.lengths)
        exact += reverse_kl(p, q).split(some.lengths)
    return {"sampled_reverse_kl": summary(sampled), "exact_reverse_kl": summary(exact)}


def all_logits(states: HiddenStates) -> Tensor:
    assert states.head is not None
    return logits(states.hidden[TAPS.hidden[0]], states.head)


def summary(rows: list[Tensor]) -> list[float]:
    """[mean over tokens, low, high]; the interval resamples prompts."""
    mean = float(torch.cat(rows).mean())
    by_prompt = np.array([float(torch.cat(rows[i : i + SAMPLES]).mean()) for i in range(0, len(rows), SAMPLES)])
    low, high = bootstrap_interval(by_prompt, seed=0)
    return [round(x, 4) for x in (mean, low, high)]


def main() -> None:
    results = {}
    for name, objective in VARIANTS.items():
        folder = Path(tempfile.mkdtemp()) / name
        parts = setup(load_recipe(RECIPE, [f"objective={objective}", f"output_dir={folder}", "health_tokens=0"]))
        before = measure(parts)
        start = time.perf_counter()
        train(parts)
        minutes = (time.perf_counter() - start) / 60
        results[name] = {
            "before": before,
            "after": measure(parts),
            "minutes": round(minutes, 1),
            "steps": parts.recipe.max_steps,
        }
        print(name, json.dumps(results[name]), flush=True)
        shutil.rmtree(folder.parent)
    out = ROOT / "benchmarks" / "results" / "bake_system_prompt.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"results": results, **describe_machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
