"""Evaluate a saved model from its name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from oprd.config.recipe import EvaluationConfig
from oprd.data.chat import stop_ids
from oprd.errors import ConfigError
from oprd.evaluate.benchmarks import load_benchmarks
from oprd.evaluate.run import Evaluation, evaluate
from oprd.evaluate.verify import Verifier
from oprd.models import LanguageModel, load_for_generation, load_tokenizer, read_shape
from oprd.progress import progress_bar
from oprd.rollout.hf import HFEngine


def evaluate_model(model: str, options: dict[str, Any], *, out: Path, gguf_file: str | None = None) -> list[Evaluation]:
    """Score a model by folder or Hub name. `options` are the keys of EvaluationConfig.

    Writes OUT/evaluations.jsonl and OUT/NAME.jsonl with every completion and its verdict. Raises ConfigError before
    anything is loaded when OUT holds an evaluation already.
    """
    config = TypeAdapter(EvaluationConfig).validate_json(json.dumps(options))
    if (out / "evaluations.jsonl").exists():
        raise ConfigError(f"{out} holds an evaluation already; choose another --out")
    tokenizer = load_tokenizer(model, gguf_file)
    benchmarks = load_benchmarks(config, tokenizer, context=read_shape(model, gguf_file).context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = LanguageModel(model=load_for_generation(model, gguf_file, device), tokenizer=tokenizer, name=model)
    engine = HFEngine(lm, stop_ids(tokenizer, lm.core.generation_config), max_sequences=config.max_sequences)
    results = []
    out.mkdir(parents=True, exist_ok=True)
    with Verifier(timeout_s=config.verify_timeout_s) as verifier:
        for benchmark in benchmarks:
            with progress_bar(f"evaluate {benchmark.name}", len(benchmark.prompts)) as bar:
                file = out / f"{benchmark.name}.jsonl"
                results.append(
                    evaluate(engine, tokenizer, benchmark, config, verifier, save_to=file, on_progress=bar.advance)
                )
            with (out / "evaluations.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": 0, "model": model} | dataclasses.asdict(results[-1])) + "\n")
    return results
