import json
import random
import re

from oprd.demo.task import Sum, completion, sums, write_jsonl, wrong_completion

STEP = re.compile(r"^(-?\d+)([+-]\d+)=(-?\d+)$")


def wrong_steps(text: str) -> int:
    steps = [STEP.match(line) for line in text.splitlines()[:-1]]
    return sum(int(step[1]) + int(step[2]) != int(step[3]) for step in steps)


def boxed(text: str) -> str:
    return re.search(r"\\boxed\{(-?\d+)\}$", text)[1]


def test_a_sum_by_hand():
    problem = Sum(terms=(12, 34, -5))
    assert (problem.problem, problem.answer) == ("12+34-5", "41")
    assert completion(problem) == "12+34=46\n46-5=41\n\\boxed{41}"


def test_totals_may_be_negative():
    assert completion(Sum(terms=(3, -40, 30, -1))) == "3-40=-37\n-37+30=-7\n-7-1=-8\n\\boxed{-8}"


def test_problems_have_three_to_five_terms_between_1_and_99():
    drawn = sums(2000, 0, held_out=False)
    assert {len(problem.terms) for problem in drawn} == {3, 4, 5}
    assert {abs(term) for problem in drawn for term in problem.terms} == set(range(1, 100))
    assert all(problem.terms[0] > 0 for problem in drawn)
    assert all(eval(problem.problem) == int(problem.answer) for problem in drawn)


def test_the_same_seed_gives_the_same_sums_and_another_seed_others():
    assert sums(50, 7, held_out=False) == sums(50, 7, held_out=False)
    assert sums(50, 7, held_out=False) != sums(50, 8, held_out=False)


def test_training_and_held_out_problems_never_overlap_whatever_the_seed():
    train = {problem.problem for seed in range(20) for problem in sums(300, seed, held_out=False)}
    held_out = {problem.problem for seed in range(20) for problem in sums(300, seed, held_out=True)}
    assert not train & held_out
    assert all(problem.held_out for problem in sums(50, 0, held_out=True))


def test_a_worked_completion_has_only_right_steps_and_boxes_the_answer():
    for problem in sums(500, 1, held_out=False):
        text = completion(problem)
        assert wrong_steps(text) == 0
        assert boxed(text) == problem.answer
        assert len(text.splitlines()) == len(problem.terms)


def test_a_wrong_completion_has_one_wrong_step_and_so_a_wrong_answer():
    rng = random.Random(0)
    for problem in sums(500, 1, held_out=False):
        text = wrong_completion(problem, rng)
        assert wrong_steps(text) == 1
        assert boxed(text) != problem.answer
        assert len(text.splitlines()) == len(problem.terms)


def test_jsonl_rows_have_problem_and_answer(tmp_path):
    problems = sums(3, 0, held_out=True)
    write_jsonl(tmp_path / "sums.jsonl", problems)
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert rows == [{"problem": problem.problem, "answer": problem.answer} for problem in problems]
