"""Verdicts on spellings of answers, in real worker processes: each line is a completion, an answer, and whether it is right."""

import json
import os
import resource
from pathlib import Path

import pytest

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
