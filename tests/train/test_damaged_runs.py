"""Whatever happens to the files of a run: resuming, reporting and evaluating give the right result or a message.

OPRD_FUZZ=500 tries as many kinds of damage; without it a few. Counts are printed with `-s`.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import MODELS, miniature_recipe
from oprd.errors import ModelError, OprdError
from oprd.evaluate.benchmarks import EvaluationConfig
from oprd.evaluate.evaluate import evaluate_model
from oprd.recipe import parse_recipe
from oprd.report.html import write_report
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from train.runs import assert_equal_runs

CASES = int(os.environ.get("OPRD_FUZZ", "0"))
LOGS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "evaluations/step-000001/held_out.jsonl")
JSON = ("run.json", "recipe.yaml", "result.json")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, train_file, held_out_file):
    """A recipe, and the run of it; beside it the same before its second step, and its page."""
    out = tmp_path_factory.mktemp("whole") / "run"
    short = {"samples": 1, "max_completion_length": 16, "limit": 2}
    tree = miniature_recipe(
        out, train_file, max_steps=2, save_steps=1, prompts_per_step=2, eval_steps=1, health_tokens=0,
        evaluation={"benchmarks": [str(held_out_file)]} | short, rollout={"group_size": 1, "max_completion_length": 16},
    )  # fmt: skip
    run_recipe(parse_recipe(tree))
    half = shutil.copytree(out, out.with_name("half") / "run")
    for file in ("student", "checkpoints/step-000002"):
        shutil.rmtree(half / file)
    (half / "result.json").unlink()
    for folder in (out, half):
        write_report([folder], folder.with_name(f"{folder.parent.name}.html"))
    return tree


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def cut_at_a_line(file: Path, rng: random.Random) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: rng.randrange(len(lines))]))


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def drop_a_line(file: Path, rng: random.Random) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines.pop(rng.randrange(len(lines)))
    file.write_bytes(b"".join(lines))


def garble(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    at = rng.randrange(len(content))
    file.write_bytes(content[:at] + rng.randbytes(9) + content[at + 9 :])


def fill_with_zeros(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    at = rng.randrange(len(content))
    file.write_bytes(content[:at] + bytes(len(content) - at))


def make_a_folder(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGE = (cut, cut_at_a_line, flip, flip, flip, drop_a_line, garble, fill_with_zeros, make_a_folder)
"""With `empty`, a cut at 0, among them."""


def message(act: Callable[[], object]) -> str:
    """What the program says of the damage; empty if it does as it should."""
    try:
        act()
    except OprdError as error:
        return str(error)
    return ""


def tell(what: str, count: Counter[str]) -> None:
    print(f"\n{what}: {sum(count.values())} tried, " + ", ".join(f"{n} {how}" for how, n in sorted(count.items())))


@pytest.mark.slow
def test_a_run_with_a_damaged_file_goes_on_to_the_same_end_or_says_what_is_wrong(tree, tmp_path):
    rng, count, whole = random.Random(1), Counter(), Path(tree["output_dir"])
    for case in range(CASES or 6):
        name, damage = rng.choice((*LOGS, *JSON)), rng.choice(DAMAGE)
        begun = whole if name == "result.json" else whole.with_name("half") / "run"
        run = shutil.copytree(begun, tmp_path / str(case) / "run")
        damage(run / name, rng)
        recipe = parse_recipe(tree | {"output_dir": str(run), "resume_from_checkpoint": "latest"})
        if told := message(lambda recipe=recipe: run_recipe(recipe)):
            assert name.rpartition("/")[2] in told or "is not a run folder" in told
        else:
            assert_equal_runs(whole, run)
        count["refused" if told else "right"] += 1
    tell("resumed", count)
    assert count["refused"]
    assert count["right"]


@pytest.mark.slow
def test_a_report_on_a_run_with_a_damaged_file_is_right_or_says_what_is_wrong(tree, tmp_path):
    """Right is what the whole lines say: a log may end early, as that of a run at work."""
    rng, count, whole = random.Random(1), Counter(), Path(tree["output_dir"])
    page = whole.with_name(f"{whole.parent.name}.html").read_text()
    for case in range(CASES or 40):
        name, damage = rng.choice((*LOGS, *JSON)), rng.choice(DAMAGE)
        run = shutil.copytree(whole, tmp_path / str(case) / "run")
        before = (run / name).read_bytes()
        damage(run / name, rng)
        (tmp_path / "page.html").unlink(missing_ok=True)
        if told := message(lambda run=run: write_report([run], tmp_path / "page.html")):
            assert name in told
            count["refused"] += 1
            continue
        found = (tmp_path / "page.html").read_text()
        if found != page:
            whole_lines = (run / name).read_bytes().rpartition(b"\n")[0] if (run / name).is_file() else b""
            assert name in LOGS
            assert damage in {drop_a_line, make_a_folder} or before.startswith(whole_lines)
        count["right" if found == page else "whole lines only"] += 1
    tell("reported", count)
    assert count["refused"]
    assert count["right"]


@pytest.mark.slow
def test_a_damaged_student_is_evaluated_right_or_refused(tree, tmp_path):
    rng, count, whole = random.Random(2), Counter(), Path(tree["output_dir"])
    config = EvaluationConfig.model_validate(tree["evaluation"])
    (right,) = evaluate_model(str(whole / "student"), config, out=tmp_path / "whole")
    names = sorted(file.name for file in (whole / "student").iterdir())
    for case in range(CASES or 6):
        student = shutil.copytree(whole / "student", tmp_path / str(case) / "student")
        name, damage = rng.choice((*names, "model.safetensors")), rng.choice(DAMAGE)
        damage(student / name, rng)
        found = []
        told = message(
            lambda student=student, found=found: found.extend(
                evaluate_model(str(student), config, out=student.with_name("out"))
            )
        )
        assert str(student) in told or found == [right]
        count["refused" if told else "right"] += 1
    tell("evaluated", count)
    assert count["refused"]


def test_a_student_with_a_flipped_bit_is_no_student_and_no_teacher(tree, tmp_path, train_file):
    student = shutil.copytree(Path(tree["output_dir"]) / "student", tmp_path / "student")
    flip(student / "model.safetensors", random.Random(3))
    same = {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"}
    for models in ({"student": {"model": str(student)}}, {"teacher": same | {"model": str(student)}}):
        with pytest.raises(ModelError, match=r"model\.safetensors was damaged or changed.*delete SHA256SUMS"):
            setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file) | models))
    (student / "SHA256SUMS").unlink()
    setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, student={"model": str(student)})))


def test_a_deleted_log_is_given_up_with_a_warning(tree, tmp_path, capfd):
    run = shutil.copytree(Path(tree["output_dir"]).with_name("half") / "run", tmp_path / "run")
    (run / "samples.jsonl").unlink()
    run_recipe(parse_recipe(tree | {"output_dir": str(run), "resume_from_checkpoint": "latest"}))
    assert "samples.jsonl is gone; it starts anew after step 1" in capfd.readouterr().err
    assert_equal_runs(Path(tree["output_dir"]), run)
