"""Evaluate a model: sample, verify, count. Each completion is kept with its verdict."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd.config.recipe import EvaluationConfig
from oprd.data.chat import decode
from oprd.evaluate import metrics
from oprd.evaluate.benchmarks import Benchmark
from oprd.evaluate.verify import Verifier
from oprd.rollout.base import RolloutEngine, Sampling
from oprd.types import PromptBatch, Rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores on one benchmark: means over its problems, each with a 95% bootstrap interval over problems."""

    benchmark: str
    problems: int
    samples: int
    """Completions per problem: the k of the following."""
    avg_at_k: float
    avg_at_k_low: float
    avg_at_k_high: float
    pass_at_1: float
    pass_at_half_k: float
    """Unbiased pass@(k/2), k/2 rounded up: pass@k itself is best@k when only k are drawn."""
    best_at_k: float
    best_at_k_low: float
    best_at_k_high: float
    maj_at_k: float
    maj_at_k_low: float
    maj_at_k_high: float
    mean_length: float
    """In tokens, the stop token included."""
    distinct_4: float
    truncated_share: float
    no_answer_share: float
    timed_out: int
    """Completions whose verification met the time limit; they count as wrong."""


def evaluation_from(row: Mapping[str, Any]) -> Evaluation:
    """An evaluation from its stored line, which may say more (the step, the model)."""
    return Evaluation(**{field.name: row[field.name] for field in fields(Evaluation)})


Gather = Callable[[list[Any]], list[Any]]


def sampling_of(config: EvaluationConfig) -> Sampling:
    return Sampling(
        temperature=config.sampling_temperature,
        top_p=config.top_p,
        max_tokens=config.max_completion_length,
        samples=config.samples,
    )


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    config: EvaluationConfig,
    verifier: Verifier,
    *,
    save_to: Path | None,
    on_progress: Callable[[int], None] = lambda done: None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = lambda rows: rows,
) -> Evaluation:
    """Sample `config.samples` completions of each problem and score them.

    Processes share the problems; `gather` concatenates their rows. `save_to` gets one JSON line per completion (on one
    process). `on_progress` is told the number of problems just done.
    """
    rows: list[dict[str, Any]] = []
    mine = list(range(len(benchmark.prompts)))[rank::world_size]
    per_call = max(1, config.max_sequences // config.samples)
    for start in range(0, len(mine), per_call):
        problems = mine[start : start + per_call]
        batch = PromptBatch(prompts=tuple(benchmark.prompts[i] for i in problems))
        rollouts = engine.generate(batch, sampling_of(config), seed=config.seed * 1_000_003 + problems[0])
        rows += _rows(rollouts, tokenizer, verifier)
        on_progress(len(problems))
    rows = sorted(gather(rows), key=lambda row: row["row"])
    if save_to is not None:
        save_to.parent.mkdir(parents=True, exist_ok=True)
        save_to.write_text(
            "".join(json.dumps(_public(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return score(benchmark.name, rows, config)


def score(name: str, rows: list[dict[str, Any]], config: EvaluationConfig) -> Evaluation:
    """Scores from rows sorted by problem, `config.samples` of each."""
    k = config.samples
    correct = np.array([row["correct"] for row in rows], dtype=bool).reshape(-1, k)
    extracted = [[row["extracted"] for row in rows[i : i + k]] for i in range(0, len(rows), k)]
    avg, best, maj = metrics.avg_at_k(correct), metrics.best_at_k(correct), metrics.maj_at_k(extracted, correct)
    low_high = {
        f"{key}_at_k": metrics.bootstrap_interval(values, seed=config.seed)
        for key, values in (("avg", avg), ("best", best), ("maj", maj))
    }
    return Evaluation(
        benchmark=name,
        problems=len(correct),
        samples=k,
        avg_at_k=float(avg.mean()),
        best_at_k=float(best.mean()),
        maj_at_k=float(maj.mean()),
        **{f"{key}_low": low for key, (low, _) in low_high.items()},
        **{f"{key}_high": high for key, (_, high) in low_high.items()},
        pass_at_1=float(metrics.pass_at_k(correct, 1).mean()),
        pass_at_half_k=float(metrics.pass_at_k(correct, (k + 1) // 2).mean()),
        mean_length=float(np.mean([row["length"] for row in rows])),
        distinct_4=metrics.distinct_n([row["ids"] for row in rows], 4),
        truncated_share=float(np.mean([not row["finished"] for row in rows])),
        no_answer_share=float(np.mean([row["outcome"] == "no_answer" for row in rows])),
        timed_out=sum(row["outcome"] in {"timed_out", "crashed"} for row in rows),
    )


def _rows(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, verifier: Verifier) -> list[dict[str, Any]]:
    texts = [decode(tokenizer, ids) for ids in rollouts.completion_ids]
    verdicts = verifier.verify(texts, [str(prompt.answer) for prompt in rollouts.prompts])
    together = zip(rollouts.prompts, rollouts.completion_ids, rollouts.finished, texts, verdicts, strict=True)
    return [
        {
            "row": prompt.row,
            "problem": prompt.messages[-1].content,
            "answer": prompt.answer,
            "completion": text,
            "length": len(ids),
            "finished": finished,
            "ids": ids,
        }
        | {"correct": verdict.correct, "outcome": verdict.outcome, "extracted": verdict.extracted}
        for prompt, ids, finished, text, verdict in together
    ]


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "ids"}
