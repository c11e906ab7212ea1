"""Evaluation of a model, alone, resumed, and shared by ranks."""

import json
from dataclasses import asdict, replace

import pytest
from accelerate import Accelerator

from conftest import MODELS, load_miniature
from oprd.distributed import Ranks
from oprd.errors import ConfigError, DataError
from oprd.evaluate import benchmarks
from oprd.evaluate.benchmarks import EvaluationConfig, load_benchmarks
from oprd.evaluate.evaluate import Evaluation, Evaluator, evaluate_model
from oprd.files import read_jsonl
from oprd.rollout.base import RolloutEngine
from oprd.types import Rollouts
from oprd.verify.judge import judge
from oprd.verify.pool import Verdict, VerifierPool
from train.runs import read_lines


class Sure(RolloutEngine):
    """Writes `row` for the problem of that row, the same in every sample."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.calls, self.syncs = tokenizer, [], 0

    def sync_weights(self):
        self.syncs += 1

    def at_once(self, tokens):
        return 8

    def generate(self, prompts, sampling, *, seed, places=None):
        self.calls.append((seed, places))
        repeated = tuple(prompt for prompt in prompts for _ in range(sampling.samples))
        ids = tuple(tuple(self.tokenizer(str(prompt.row))["input_ids"]) for prompt in repeated)
        return Rollouts(prompts=repeated, completion_ids=ids, finished=(True,) * len(ids))


class OddRows(VerifierPool):
    """Calls odd numbers correct."""

    def verify(self, completions, answers):
        return [Verdict(outcome="correct" if int(text) % 2 else "wrong", extracted=text) for text in completions]


def one_of_two(rank: int) -> Ranks:
    """A rank whose partner gathers nothing."""
    ranks = Ranks(Accelerator(cpu=True))
    ranks.rank, ranks.size = rank, 2
    return ranks


@pytest.fixture
def evaluator(held_out_file):
    tokenizer = load_miniature("base").tokenizer
    config = EvaluationConfig(benchmarks=[str(held_out_file)], samples=2, seed=3)
    benchmarks = load_benchmarks(config, tokenizer, context=2048)
    verifier = OddRows()
    engine = Sure(tokenizer)
    return Evaluator(config=config, benchmarks=benchmarks, engine=engine, tokenizer=tokenizer, verifier=verifier)


def test_scores_files_and_seeds_by_hand(evaluator, tmp_path):
    (result,) = evaluator.run(tmp_path / "log.jsonl", tmp_path / "done", {"step": 5, "training_seconds": 1.5})
    assert (result.problems, result.samples, result.avg_at_k, result.best_at_k) == (12, 2, 0.5, 0.5)
    assert evaluator.engine.syncs == 1
    # 8 // 2 = 4 problems a call; a completion's random numbers follow from its problem's place, not from the call
    assert evaluator.engine.calls == [(3_000_009, range(first, first + 4)) for first in (0, 4, 8)]
    assert read_jsonl(tmp_path / "log.jsonl") == [{"step": 5, "training_seconds": 1.5} | asdict(result)]
    rows = read_lines(tmp_path / "done" / "held_out.jsonl")
    assert [(row["row"], row["completion"], row["correct"]) for row in rows[:4]] == [
        (0, "0", False), (0, "0", False), (1, "1", True), (1, "1", True)
    ]  # fmt: skip


def test_what_the_log_has_for_a_step_is_not_computed_again(evaluator, tmp_path):
    log = tmp_path / "log.jsonl"
    first = evaluator.run(log, tmp_path, {"step": 5})
    calls = len(evaluator.engine.calls)
    assert evaluator.run(log, tmp_path, {"step": 5}) == first
    assert len(evaluator.engine.calls) == calls
    evaluator.run(log, tmp_path, {"step": 6})
    assert len(evaluator.engine.calls) == 2 * calls
    assert [row["step"] for row in read_jsonl(log)] == [5, 6]


def test_ranks_share_the_problems(evaluator):
    parts = []
    for rank in (0, 1):
        shared = replace(evaluator, ranks=one_of_two(rank))
        parts.append(shared.evaluate(shared.benchmarks[0]))
    # rank 0 has the even rows, rank 1 the odd ones
    assert [(part.problems, part.avg_at_k) for part in parts] == [(6, 0.0), (6, 1.0)]


def test_a_benchmark_without_answers_is_refused(tmp_path):
    (tmp_path / "open.jsonl").write_text(json.dumps({"problem": "1+1"}) + "\n")
    path = str(tmp_path / "open.jsonl")
    config = EvaluationConfig(benchmarks=[path])
    with pytest.raises(DataError, match=r"open\.jsonl': row 0 has no column 'answer'"):
        load_benchmarks(config, load_miniature("base").tokenizer, context=2048)


def test_a_saved_model_is_scored_once_per_folder(held_out_file, tmp_path):
    config = EvaluationConfig(benchmarks=[str(held_out_file)], samples=2, limit=4, max_completion_length=48)
    (result,) = evaluate_model(str(MODELS / "teacher"), config, out=tmp_path)
    (row,) = read_jsonl(tmp_path / "evaluations.jsonl")
    assert Evaluation.from_row(row) == result
    assert result.avg_at_k >= 0.5
    assert len(read_lines(tmp_path / "held_out.jsonl")) == 8
    with pytest.raises(ConfigError, match="holds an evaluation already"):
        evaluate_model("no model", config, out=tmp_path)


def test_two_benchmarks_of_one_file_name_stay_apart(held_out_file, tmp_path):
    tokenizer, files = load_miniature("base").tokenizer, []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(str(tmp_path / folder / "test.jsonl"))
        (tmp_path / folder / "test.jsonl").write_text(held_out_file.read_text())
    one, other = load_benchmarks(EvaluationConfig(benchmarks=files), tokenizer, context=2048)
    assert one.name.endswith("a_test.jsonl")
    assert other.name.endswith("b_test.jsonl")
    with pytest.raises(ConfigError, match="names one twice"):
        load_benchmarks(EvaluationConfig(benchmarks=[files[0], files[0]]), tokenizer, context=2048)


CARDS = {
    "aime24": {"id": 60, "problem": "Aya goes for a walk", "solution": r"\boxed{204}", "url": "https://x"},
    "aime25": {"problem": "Find the sum", "answer": "204", "id": "0"},
    "aimo": {"id": 0, "problem": "Let", "solution": "So it is 204.", "answer": "204", "url": "https://x"},
    "amc23": {"id": 0, "answer": "204.0", "url": "https://x", "question": "Cities $A$ and $B$"},
    "hmmt25": {"problem_idx": 1, "problem": "Compute", "answer": "204", "problem_type": ["Algebra"]},
    "math500": {
        "problem": "Convert", "solution": r"It is $\boxed{204}$.", "answer": "204", "subject": "Precalculus", "level": 2,
        "unique_id": "test/precalculus/807.json",
    },
}  # fmt: skip
"""A row of each named benchmark, with the columns of its public card."""


@pytest.mark.parametrize("name", [*CARDS, "own"])
def test_every_named_benchmark_is_read_from_its_own_columns_and_judged(name, tmp_path, monkeypatch):
    assert set(CARDS) == set(benchmarks.HUB_NAMES)
    row, file = CARDS.get(name, CARDS["aime24"]), tmp_path / "own.jsonl"
    file.write_text(json.dumps(row) + "\n")
    if name != "own":
        monkeypatch.setitem(benchmarks.HUB_NAMES, name, (str(file), *benchmarks.HUB_NAMES[name][1:]))
    config = EvaluationConfig(
        benchmarks=[str(file) if name == "own" else name], answer="solution" if name == "own" else "answer"
    )
    (found,) = load_benchmarks(config, load_miniature("base").tokenizer, context=4096)
    assert found.prompts[0].messages[0].content == row.get("problem", row.get("question"))
    gold = str(found.prompts[0].answer)
    assert [judge(rf"So \boxed{{{n}}}.", gold)["outcome"] for n in (204, 205)] == ["correct", "wrong"]
