"""Evaluation: sample completions of every problem, check their answers, compute scores."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import decode, texts_to_judge
from oprd.distributed import Ranks
from oprd.errors import ConfigError
from oprd.evaluate import metrics
from oprd.evaluate.benchmarks import Benchmark, EvaluationConfig, load_benchmarks
from oprd.files import append_jsonl, read_jsonl, write_atomically
from oprd.models.loading import ModelFacts, load_frozen
from oprd.progress import progress_bar
from oprd.rollout.base import RolloutEngine
from oprd.rollout.hf import HFEngine
from oprd.types import Rollouts
from oprd.verify.pool import VerifierPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores on one benchmark: means over its problems, with 95% bootstrap intervals over problems."""

    benchmark: str
    problems: int
    samples: int
    """Completions per problem, k."""
    avg_at_k: float
    avg_at_k_low: float
    avg_at_k_high: float
    pass_at_1: float
    pass_at_half_k: float
    """Unbiased pass@(k/2), k/2 rounded up: from k samples pass@k itself is no better than best@k."""
    best_at_k: float
    best_at_k_low: float
    best_at_k_high: float
    maj_at_k: float
    maj_at_k_low: float
    maj_at_k_high: float
    mean_length: float
    """Tokens, the stop token included."""
    distinct_4: float
    truncated_share: float
    no_answer_share: float
    timed_out: int
    """Completions that could not be checked within the time limit; they count as wrong."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The evaluation in a line of evaluations.jsonl, which may hold more (step, model)."""
        return cls(**{column.name: row[column.name] for column in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Scores the engine's current weights on benchmarks. Every rank calls it."""

    config: EvaluationConfig
    benchmarks: tuple[Benchmark, ...]
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    verifier: VerifierPool
    ranks: Ranks = field(default_factory=lambda: Ranks(Accelerator()))
    before_batch: Callable[[], None] = lambda: None
    """Called by every rank as often; what it raises ends the evaluation."""

    def run(self, log: Path, completions: Path, facts: Mapping[str, Any]) -> tuple[Evaluation, ...]:
        """Every benchmark. Appends a line to `log` for each, with `facts` (the step and what it cost), and writes
        COMPLETIONS/NAME.jsonl. What `log` has for this step already is not computed again."""
        known = {row["benchmark"]: row for row in read_jsonl(log) if row["step"] == facts["step"]}
        results = []
        with self.engine.session():
            for benchmark in self.benchmarks:
                name = benchmark.name
                row = known.get(name) or asdict(self.evaluate(benchmark, completions / f"{name}.jsonl"))
                if name not in known and self.ranks.is_main:
                    append_jsonl(log, {**facts, **row})
                results.append(Evaluation.from_row(row))
        self.ranks.wait()
        return tuple(results)

    def evaluate(self, benchmark: Benchmark, save_to: Path | None = None) -> Evaluation:
        """Scores on one benchmark. `save_to` gets a JSON line per completion, with its verdict."""
        config, prompts, ranks = self.config, benchmark.prompts, self.ranks
        sampling = config.sampling(samples=config.samples)
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
        per_call = ranks.size * max(1, self.engine.at_once(longest) // config.samples)
        rows: list[dict[str, Any]] = []
        with progress_bar(f"evaluate {benchmark.name}", len(prompts), shown=ranks.is_main) as bar:
            for first in range(ranks.rank, len(prompts) + ranks.rank, per_call):
                self.before_batch()
                mine = slice(first, first + per_call, ranks.size)
                if problems := prompts[mine]:
                    places = range(len(prompts))[mine]
                    written = self.engine.generate(problems, sampling, seed=config.seed * 1_000_003, places=places)
                    rows += self._checked(written)
                    bar.advance(len(problems) * ranks.size)
        rows = sorted(ranks.gather_objects(rows), key=lambda row: row["row"])
        if save_to is not None and ranks.is_main:
            public = [{key: value for key, value in row.items() if key != "ids"} for row in rows]
            write_atomically(save_to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in public))
        return score(benchmark.name, rows, config)

    def _checked(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        """One row per completion, with its verdict."""
        texts = [decode(self.tokenizer, ids) for ids in rollouts.completion_ids]
        answers = [str(prompt.answer) for prompt in rollouts.prompts]
        verdicts = self.verifier.verify(texts_to_judge(self.tokenizer, rollouts), answers)
        together = zip(rollouts.prompts, rollouts.completion_ids, rollouts.finished, texts, verdicts, strict=True)
        return [
            {"row": prompt.row, "problem": prompt.messages[-1].content, "answer": prompt.answer, "completion": text}
            | {
                "length": len(ids),
                "finished": finished,
                "ids": np.array(ids, np.int32),
                "correct": verdict.correct,
                **asdict(verdict),
            }
            for prompt, ids, finished, text, verdict in together
        ]


def score(name: str, rows: list[dict[str, Any]], config: EvaluationConfig) -> Evaluation:
    """Scores from one row per completion, sorted by problem, `config.samples` rows of each."""
    k = config.samples
    correct = np.array([row["correct"] for row in rows], dtype=bool).reshape(-1, k)
    extracted = [[row["extracted"] for row in rows[i : i + k]] for i in range(0, len(rows), k)]
    values = {"avg_at_k": metrics.avg_at_k(correct), "best_at_k": metrics.best_at_k(correct)}
    values["maj_at_k"] = metrics.maj_at_k(extracted, correct)
    intervals = {}
    for key, value in values.items():
        low, high = metrics.bootstrap_interval(value, seed=config.seed)
        intervals |= {key: float(value.mean()), f"{key}_low": low, f"{key}_high": high}
    return Evaluation(
        benchmark=name,
        problems=len(correct),
        samples=k,
        **intervals,
        pass_at_1=float(metrics.pass_at_k(correct, 1).mean()),
        pass_at_half_k=float(metrics.pass_at_k(correct, (k + 1) // 2).mean()),
        mean_length=float(np.mean([row["length"] for row in rows])),
        distinct_4=metrics.distinct_n([row["ids"] for row in rows], 4),
        truncated_share=float(np.mean([not row["finished"] for row in rows])),
        no_answer_share=float(np.mean([row["outcome"] == "no_answer" for row in rows])),
        timed_out=sum(row["outcome"] in {"timed_out", "crashed"} for row in rows),
    )


def evaluate_model(model: str, config: EvaluationConfig, *, out: Path) -> tuple[Evaluation, ...]:
    """Scores of a saved model, by folder or Hub name, in bfloat16 on a GPU and in float32 on a CPU. Writes
    OUT/evaluations.jsonl, and OUT/NAME.jsonl with every completion and its verdict. Raises ConfigError when there is one."""
    log = out / "evaluations.jsonl"
    if log.exists():
        raise ConfigError(f"{out} holds an evaluation already; choose another --out")
    facts = ModelFacts.read(model)
    benchmarks = load_benchmarks(config, facts.tokenizer, context=facts.context, vocabulary=facts.vocabulary)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    frozen = load_frozen(model, facts.tokenizer, torch.device(device), dtype=dtype)
    with VerifierPool() as verifier:
        evaluator = Evaluator(
            config=config, benchmarks=benchmarks, engine=HFEngine(frozen),
            tokenizer=facts.tokenizer, verifier=verifier,
        )  # fmt: skip
        return evaluator.run(log, out, {"step": 0, "model": model})


def print_table(rows: Iterable[tuple[str, Evaluation]]) -> None:
    """Print a line per evaluation, with a name each; in a narrow terminal only the average and its interval."""
    console, table = Console(markup=False), Table()
    headers = ("", "avg@k", "95% interval", "best@k", "maj@k", "length", "cut")[: 7 if console.width >= 76 else 3]
    for header in headers:
        table.add_column(header, justify="right" if header else "left", overflow="fold", no_wrap=bool(header))
    for name, row in rows:
        interval = f"{row.avg_at_k_low:.3f}-{row.avg_at_k_high:.3f}"
        others = (f"{row.best_at_k:.3f}", f"{row.maj_at_k:.3f}", f"{row.mean_length:.0f}", f"{row.truncated_share:.0%}")
        table.add_row(*(name, f"{row.avg_at_k:.3f}", interval, *others)[: len(headers)])
    console.print(table)
