"""Verdicts on spellings of answers, in real worker processes: each line is a completion, an answer, and whether it is right."""

import json
import os
import resource
from pathlib import Path

import psutil
import pytest
from golds import spellings

from conftest import load_miniature
from oprd.data.chat import encode, render, texts_to_judge
from oprd.types import Message, Prompt, Rollouts
from oprd.verify.judge import judge
from oprd.verify.pool import VerifierPool

TABLES = Path(__file__).parent


@pytest.mark.parametrize("table", ["verdicts", "spellings"])
def test_every_line_of_the_table_is_judged_as_it_says(table):
    rows = [json.loads(x) for x in (TABLES / f"{table}.jsonl").read_text(encoding="utf-8").split("\n") if x]
    assert len(rows) >= 125
    with VerifierPool(timeout_s=30) as pool:
        verdicts = pool.verify([r["completion"] for r in rows], [r["answer"] for r in rows])
    assert [r for r, v in zip(rows, verdicts, strict=True) if v.correct != r["right"]] == []
    assert {v.outcome for v in verdicts} <= {"correct", "wrong", "no_answer"}


@pytest.mark.slow
def test_every_reference_answer_is_known_in_other_spellings_and_told_from_other_answers():
    golds = (TABLES / "golds.txt").read_text(encoding="utf-8").splitlines()
    rows = [
        (text, gold, right)
        for gold in golds
        for texts, right in zip(spellings(gold), (True, False), strict=True)
        for text in texts[:2]
    ]
    assert len(rows) == 4 * len(golds) > 800
    with VerifierPool(timeout_s=60) as pool:
        verdicts = pool.verify([f"So \\boxed{{{text}}}." for text, *_ in rows], [gold for _, gold, _ in rows])
    assert [row for row, v in zip(rows, verdicts, strict=True) if v.correct != row[2]] == []


def test_long_lists_in_another_order_are_compared_in_time():
    numbers = [str(i) for i in range(3000)]
    gold, other = ",".join(numbers), ",".join(numbers[::-1])
    with VerifierPool(timeout_s=60, workers=1) as pool:
        pool.verify([r"\boxed{1}"], ["1"])
        begun = cpu(pool)
        answers = [other, other.removesuffix(",0"), other.replace(",0", ",0.5"), ",".join(f"{i}.5" for i in numbers)]
        verdicts = pool.verify([f"\\boxed{{{answer}}}" for answer in answers], [gold] * 4)
        assert cpu(pool) - begun < 10  # 0.2 s each; pair by pair, minutes
    assert [v.outcome for v in verdicts] == ["correct", "wrong", "wrong", "wrong"]


def cpu(pool) -> float:
    (worker,) = pool._workers
    return sum(psutil.Process(worker._process.pid).cpu_times()[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "9" * 5000,  # more digits than int() takes
        "{" * 3000 + "5" + "}" * 3000,
        ",".join(map(str, range(3000))),
        r"\pm" * 200 + "1",
        "[" * 200 + "5" + "]" * 200,
    ],
)
def test_a_strange_answer_does_not_crash_the_worker(answer):
    with VerifierPool(timeout_s=3, workers=1) as pool:
        (verdict,) = pool.verify([f"\\boxed{{{answer}}}"], ["7"])
    assert verdict.outcome in ("wrong", "timed_out")


def test_nothing_is_imported_from_the_working_folder(tmp_path, monkeypatch):
    for name in ("sympy", "random", "math_verify", "oprd"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close(); raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))  # an empty entry: that folder
    with VerifierPool(workers=1) as pool:
        assert pool.verify([r"\boxed{\frac{1}{2}}"], ["0.5"])[0].correct
    assert not (tmp_path / "imported").exists()


def test_a_worker_has_a_limit_of_memory():
    with VerifierPool(workers=1) as pool:
        pool.verify([r"\boxed{1}"], ["1"])
        (worker,) = pool._workers
        assert resource.prlimit(worker._process.pid, resource.RLIMIT_DATA)[0] <= 2 << 30


@pytest.mark.parametrize(
    ("opened", "completion", "outcome"),
    [
        ("<think>\n", r"maybe \boxed{5}", "no_answer"),  # cut inside the reasoning that the prompt began
        ("<think>\n", r"maybe \boxed{3}</think>\boxed{5}", "correct"),
        ("<think>\n\n</think>\n\n", r"\boxed{5}", "correct"),
        ("", r"\boxed{5}", "correct"),
        ("", r"<|channel|>analysis<|message|>maybe \boxed{5}", "no_answer"),
        (
            "",
            r"<|channel|>analysis<|message|>\boxed{3}<|end|><|channel|>final<|message|>It is \boxed{5}<|end|>",
            "correct",
        ),
        (
            "",
            r"<|channel|>analysis<|message|>\boxed{5}<|end|><|channel|>final<|message|>It is \boxed{3}<|end|>",
            "wrong",
        ),
    ],
)
def test_reasoning_is_known_by_special_tokens_and_by_the_prompt(opened, completion, outcome):
    tokenizer = load_miniature("base").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    turn = (Message(role="user", content="Write <think>."),)
    prompt = Prompt(row=0, messages=turn, token_ids=(*render(tokenizer, turn), *encode(tokenizer, opened)))
    ids = (encode(tokenizer, completion),)
    (text,) = texts_to_judge(tokenizer, Rollouts(prompts=(prompt,), completion_ids=ids, finished=(True,)))
    assert "<|end|>" not in text
    assert judge(text, "5")["outcome"] == outcome
