"""How much of a system prompt gets into the weights: recipes/bake_system_prompt.yaml with OPRD and with OPD.

Measured before and after on held-out prompts: KL(student || prompted teacher) per token of fresh student completions,
sampled (log p - log q) and exact over the vocabulary at the same positions, with a 95% bootstrap interval over prompts.

    python scripts/export_smollm2.py runs/smollm2 && python benchmarks/bake_system_prompt.py
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from oprd.config.reading import load_recipe
from oprd.data.collate import collate
from oprd.data.prompts import load_prompts
from oprd.evaluate.metrics import bootstrap_interval
from oprd.kernels.chunked import logits
from oprd.kernels.reference import reverse_kl, token_logprobs
from oprd.rollout.base import Sampling
from oprd.train.build import Run, build
from oprd.train.loop import train
from oprd.train.run_folder import describe_machine
from oprd.types import PromptBatch, Reading, TokenSelection

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "bake_system_prompt.yaml"
HELD_OUT = ROOT / "recipes" / "bake_held_out.jsonl"
SAMPLES, BATCH = 2, 16
VARIANTS = {"oprd": "{type: oprd, tokens: all}", "opd": "{type: opd}"}
ALL = TokenSelection(keep="all")


def measure(run: Run) -> dict[str, float | list[float]]:
    """Mean per-token KL to the prompted teacher on the student's completions of the held-out prompts, in nats."""
    data = type(run.recipe.data)(prompts=str(HELD_OUT))
    prompts = load_prompts(data, run.lm.tokenizer, context=2048, room=40)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=40, samples=SAMPLES)
    rollouts = run.engine.generate(PromptBatch(prompts=prompts), sampling, seed=7)
    reading = Reading(block=run.lm.num_blocks, at="prediction", tokens=ALL)
    sampled, exact = [], []
    for start in range(0, len(rollouts), BATCH):
        some = rollouts.take(range(start, min(start + BATCH, len(rollouts))))
        targets = run.teacher.targets(some, [reading], head=True)
        batch = collate([p.token_ids for p in some.prompts], some.completion_ids, pad_id=0, device=run.lm.device)
        run.stage.model.eval()
        states = run.read(batch, [reading], True)
        p = logits(states.hidden[reading], states.head)
        q = logits(targets.hidden[reading], targets.head)
        ids = batch.sampled_ids(ALL)
        sampled += (token_logprobs(p, ids) - token_logprobs(q, ids)).split(some.lengths)
        exact += reverse_kl(p, q).split(some.lengths)
    return {"sampled_reverse_kl": summary(sampled), "exact_reverse_kl": summary(exact)}


def summary(rows: list[torch.Tensor]) -> list[float]:
    """[mean over tokens, low, high]; the interval resamples prompts."""
    mean = float(torch.cat(rows).mean())
    by_prompt = np.array([float(torch.cat(rows[i : i + SAMPLES]).mean()) for i in range(0, len(rows), SAMPLES)])
    low, high = bootstrap_interval(by_prompt, seed=0)
    return [round(x, 4) for x in (mean, low, high)]


def main() -> None:
    results = {}
    for name, objective in VARIANTS.items():
        folder = Path(tempfile.mkdtemp()) / name
        run = build(load_recipe(RECIPE, [f"objective={objective}", f"output_dir={folder}", "health_tokens=0"]))
        before = measure(run)
        start = time.perf_counter()
        train(run)
        minutes = (time.perf_counter() - start) / 60
        results[name] = {
            "before": before,
            "after": measure(run),
            "minutes": round(minutes, 1),
            "steps": run.recipe.max_steps,
        }
        print(name, json.dumps(results[name]), flush=True)
        shutil.rmtree(folder.parent)
    out = ROOT / "benchmarks" / "results" / "bake_system_prompt.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"results": results, **describe_machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
