"""Tokens per second of both rollout engines in one run: `python benchmarks/engines.py`, after `make test-vllm` has made .venv-vllm.

SmolLM2-135M in float32 on random prompts: completions of equal length, and of very unequal ones (each token ends a
completion if its id is among 1 in 64, drawn once). CPU seconds are those of all processes of an engine: on a machine that
others use as well, wall seconds say little. Engines take turns; the best of the rounds counts. The start of vLLM does not.

    python scripts/export_smollm2.py runs/smollm2 && python benchmarks/engines.py
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.distributed import Ranks
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.rollout.base import EngineContext, RolloutEngine
from oprd.rollout.hf import HFEngine
from oprd.rollout.vllm import VLLMEngineConfig
from oprd.train.run_folder import describe_machine
from oprd.types import Message, Prompt

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "smollm2"
RESULT = ROOT / "benchmarks" / "results" / "engines.json"
PROMPT, ONE_IN = 64, 64


def prompts(lm: LanguageModel, rows: int) -> tuple[Prompt, ...]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, len(lm.tokenizer), (rows, PROMPT), generator=draw).tolist()
    turns = (Message(role="user", content=""),)
    return tuple(Prompt(row=i, messages=turns, token_ids=tuple(row)) for i, row in enumerate(ids))


def stops(vocabulary: int, lengths: str) -> tuple[int, ...]:
    """The ids that end a completion: one that is hardly ever sampled, or many."""
    chosen = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1)).tolist()
    return tuple(sorted(chosen[: vocabulary // ONE_IN if lengths == "unequal" else 1]))


def cpu_seconds() -> float:
    """Of this process and those it has started."""
    me = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (me, *me.children(recursive=True)))


def measure(engine: RolloutEngine, asked: tuple[Prompt, ...], longest: int, seed: int) -> dict[str, float]:
    with engine.session():  # the weights are there before the clock starts
        wall, cpu = time.perf_counter(), cpu_seconds()
        sampling = Sampling(temperature=1.0, max_new_tokens=longest)
        lengths = engine.generate(asked, sampling, seed=seed).lengths
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    tokens = sum(lengths)
    found = {
        "tokens_per_cpu_second": tokens / cpu,
        "tokens_per_second": tokens / wall,
        "cpu_seconds": cpu,
        "tokens": tokens,
    }
    return {key: round(value, 2) for key, value in found.items()} | {"longest": max(lengths), "shortest": min(lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="of the environment with vLLM"
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--longest", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer, ranks, found = AutoTokenizer.from_pretrained(args.model), Ranks(Accelerator(cpu=True)), dict[str, Any]()
    for lengths in ("equal", "unequal"):
        lm = LanguageModel(model=model, tokenizer=tokenizer, name="student", pair_stops=stops(len(tokenizer), lengths))
        asked = prompts(lm, args.rows)
        with tempfile.TemporaryDirectory() as folder:
            tokens = PROMPT + args.longest
            context = EngineContext(ranks=ranks, folder=Path(folder), bf16=False, tokens=tokens)
            vllm = VLLMEngineConfig(python=args.python).build(FrozenModel(lm), context)
            engines: dict[str, RolloutEngine] = {"hf": HFEngine(FrozenModel(lm)), "vllm": vllm}
            try:
                for name, engine in engines.items():
                    rounds = [measure(engine, asked, args.longest, seed) for seed in range(args.rounds)]
                    found[f"{name}, {lengths} lengths"] = max(rounds, key=lambda row: row["tokens_per_cpu_second"])
                    print(name, lengths, rounds, flush=True)
            finally:
                vllm.close()
    settings = {"rows": args.rows, "prompt": PROMPT, "longest": args.longest, "rounds": args.rounds, "threads": 1}
    args.out.write_text(json.dumps({"engines": found, "settings": settings, **describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
