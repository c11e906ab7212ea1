"""Answers against real math-verify in real worker processes."""

import asyncio
import json
import os
import signal
import threading
import time

import pytest

from conftest import DATA
from oprd.verify.judge import last_boxed
from oprd.verify.pool import VerifierPool
from oprd.verify.reasoning import closing, final_part, left_open


@pytest.fixture(scope="module")
def verifier():
    with VerifierPool(timeout_s=4.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("completion", "answer", "outcome"),
    [
        (r"so \boxed{41}", "41", "correct"),
        (r"so \boxed{-7}", "-7", "correct"),
        (r"so \boxed{42}", "41", "wrong"),
        (r"\boxed{0.5}", r"\frac{1}{2}", "correct"),
        (r"\boxed{0.333}", r"\frac{1}{3}", "wrong"),
        (r"\boxed{−5}", "-5", "correct"),  # a unicode minus
        (r"\boxed{1,000}", "1000", "correct"),
        (r"\boxed{50\%}", "50", "correct"),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", "correct"),  # sets have no order
        (r"\boxed{(1,2)}", "(2,1)", "wrong"),  # pairs have
        (r"\boxed{(1,2)}", "[1,2]", "wrong"),  # an open interval is not the closed one
        (r"\boxed{x=3}", "3", "correct"),
        ("The answer is 17.", "17", "correct"),
        (r"first \boxed{1}, then rather \boxed{2}", "2", "correct"),  # the last box counts
        (r"first \boxed{1}, then rather \boxed{2}", "1", "wrong"),
        (r"\boxed{1},\boxed{2}", "2", "wrong"),  # both claimed
        (r"\boxed{1 or 2}", "1", "wrong"),
        (r"\boxed{1 \text{ or } 2}", "2", "wrong"),
        (r"\boxed{\boxed{3}}", "3", "correct"),
        (r"<think>\boxed{4}</think>", "4", "no_answer"),
        (r"<think>\boxed{4}", "4", "no_answer"),
        (r"<think>\boxed{3}</think> \boxed{4}", "4", "correct"),
        ("", "4", "no_answer"),
        ("no idea", "4", "no_answer"),
        (r"\boxed{42", "42", "no_answer"),  # cut in the middle of the box
        ("x" * 100_000 + r"\boxed{3}", "3", "correct"),
    ],
)
def test_an_answer_is_judged(verifier, completion, answer, outcome):
    (verdict,) = verifier.verify([completion], [answer])
    assert verdict.outcome == outcome
    assert verdict.correct == (outcome == "correct")


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" + "(" * 500 + "1" + ")" * 500 + "}"])
def test_a_bomb_is_timed_out_and_does_not_stop_the_rest(bomb):
    start = time.monotonic()
    with VerifierPool(timeout_s=2.0) as verifier:
        verdicts = verifier.verify([r"\boxed{1}", bomb, r"\boxed{2}", r"\boxed{\frac{4}{2}}"], ["1", "5", "2", "2"])
    assert [v.outcome for v in verdicts] == ["correct", "timed_out", "correct", "correct"]
    assert time.monotonic() - start < 30


def test_a_worker_that_dies_is_replaced_and_its_item_counted_as_crashed():
    with VerifierPool(workers=1, timeout_s=30) as verifier:
        verifier.verify([r"\boxed{1}"], ["1"])
        worker = verifier._idle.get()
        verifier._idle.put(worker)
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        outcomes = [v.outcome for v in verifier.verify([r"\boxed{1}", r"\boxed{1}"], ["1", "1"])]
    assert outcomes == ["crashed", "correct"]


def test_processes_start_when_first_needed_and_again_after_close():
    pool = VerifierPool(workers=1)
    (worker,) = pool._workers
    assert worker._process is None
    for _ in range(2):
        assert pool.verify([r"\boxed{1}"], ["1"])[0].correct
        process = worker._process
        pool.close()
        assert process.poll() is not None
        assert worker._process is None


def test_it_works_from_a_thread_and_from_async_code(verifier):
    found = []
    thread = threading.Thread(target=lambda: found.extend(verifier.verify([r"\boxed{\frac12}"], ["0.5"])))
    thread.start()
    thread.join(60)

    async def ask():
        return await asyncio.to_thread(verifier.verify, [r"\boxed{\frac12}"], ["0.5"])

    found.extend(asyncio.run(ask()))
    assert [v.outcome for v in found] == ["correct", "correct"]


def test_every_known_answer_of_the_benchmarks_is_right_when_given_back(verifier):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    names = ("aime24", "aime25", "aimo", "amc23", "hmmt25", "math500")
    rows = [json.loads(x) for name in names for x in (DATA / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == 713
    verdicts = verifier.verify(
        [f"so the answer is $\\boxed{{{r['answer']}}}$." for r in rows], [r["answer"] for r in rows]
    )
    assert [r["answer"] for r, v in zip(rows, verdicts, strict=True) if not v.correct] == []


def test_another_rows_answer_is_wrong(verifier):
    """The check above would pass if everything were right."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    answers = [json.loads(x)["answer"] for x in (DATA / "math500.jsonl").read_text().splitlines()][:200]
    shifted = answers[1:] + answers[:1]
    verdicts = verifier.verify([f"\\boxed{{{a}}}" for a in shifted], answers)
    assert sum(v.correct for v in verdicts) <= 10  # some neighbours are equal by chance


def test_boxes_are_found_by_their_braces():
    assert last_boxed(r"\boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} and \boxed{2}") == "1,2"
    assert last_boxed(r"\boxed{1} hence \boxed{2}") == "2"
    assert last_boxed("none") is None
    assert final_part("<think>a</think>b") == "b"


@pytest.mark.parametrize(
    "mark",
    [
        "<think>\n",
        "<seed:think>",
        "[THINK]",
        "◁think▷",
        "<|START_THINKING|>",
        "<|channel>",
        "<|channel|>analysis<|message|>",
    ],
)
def test_reasoning_that_a_prompt_opens_can_be_closed(mark):
    assert left_open(f"<|assistant|>{mark}") == mark
    assert final_part(f"{mark}a") == ""
    assert final_part(f"{mark}a{closing(mark)}b") == "b"


def test_a_machine_that_is_busy_elsewhere_does_not_cost_a_verdict():
    """The worker stands still for longer than the limit, as if others had the processor."""
    with VerifierPool(workers=1, timeout_s=1.0) as pool:
        assert pool.verify([r"\boxed{1}"], ["1"])[0].correct
        (worker,) = pool._workers
        os.kill(worker._process.pid, signal.SIGSTOP)
        threading.Timer(2.5, os.kill, (worker._process.pid, signal.SIGCONT)).start()
        assert pool.verify([r"\boxed{1}"], ["1"])[0].outcome == "correct"
