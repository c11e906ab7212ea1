"""Student and teacher that end their texts with different tokens: either ends a completion, in training and ever after."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from conftest import load_miniature, miniature_recipe
from oprd.models.loading import load_frozen
from oprd.recipe import parse_recipe
from oprd.train.loop import train
from oprd.train.metrics import mass_on_stops
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import ALL_TOKENS, HiddenSpec, Taps
from train.runs import rollouts_of

OWN, TEACHERS = 258, 261
"""`<|system|>`, which nothing else uses here, and `<|end|>`."""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The base model as a base model: without a template, with an end of text of its own."""
    folder, lm = tmp_path_factory.mktemp("base"), load_miniature("base")
    lm.tokenizer.chat_template, lm.tokenizer.eos_token = None, "<|system|>"
    lm.model.config.eos_token_id, lm.model.generation_config = OWN, GenerationConfig(eos_token_id=OWN)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_stop_ids_of_both_end_a_completion_and_are_one_action(student, tmp_path, train_file, capfd):
    parts = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, student={"model": student})))
    assert "different tokens (<|system|><|end|>)" in " ".join(capfd.readouterr().err.split())
    assert parts.method.student.lm.stop_ids == (OWN, TEACHERS)
    assert parts.method.student.lm.head().stops == (OWN, TEACHERS)
    last = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
    read = parts.method.student.hidden(parts.method.batch(rollouts_of(parts)), Taps(hidden=(last,), head=True))
    assert read.head is not None
    assert read.head.stops == (OWN, TEACHERS)
    assert parts.method.teacher.model.lm.stop_ids == (OWN, TEACHERS)


@pytest.mark.slow
def test_the_first_step_says_how_probable_each_side_holds_each_stop(student, tmp_path, train_file, capfd):
    """Held against the models' own forward passes over the same completions, one at a time."""
    tree = miniature_recipe(
        tmp_path / "run", train_file, student={"model": student}, micro_batch_tokens=64, max_steps=2
    )
    parts = setup(parse_recipe(tree))
    written, _ = parts.method.collect(parts.sampler.batch(0), parts.recipe.rollout.sampling(samples=2), 1)
    ended = [i for i, finished in enumerate(written.finished) if finished]
    assert 1 < len(ended) < len(written)
    said = []
    for model in (load_miniature("base").model, load_miniature("teacher").model):
        with torch.no_grad():
            rows = [torch.tensor([[*written.prompts[i].token_ids, *written.completion_ids[i]]]) for i in ended]
            mass = torch.stack([model(row).logits[0, -2].softmax(-1)[[OWN, TEACHERS]] for row in rows]).mean(0)
        said.append(f"<|system|> {mass[0]:.3f}, <|end|> {mass[1]:.3f}")
    capfd.readouterr()
    train(parts)
    out = " ".join(capfd.readouterr().err.split())
    assert out.count(f"student {said[0]}; teacher {said[1]}.") == out.count("Mean probability") == 1
    assert float(mass[1]) > 0.1
    assert out.count("were cut at max_completion_length=48. Look into samples.jsonl.") == 1
    assert "not among <|system|>, <|end|>, either the student's or the teacher's stop tokens" in out
    assert mass_on_stops(parts.method, replace(written, finished=(False,) * len(written))) == ""


def test_models_that_stop_by_the_same_ids_are_left_as_they_are(tmp_path, train_file, capfd):
    parts = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file)))
    assert "different tokens" not in capfd.readouterr().err
    assert parts.method.student.lm.head().stops == ()


@pytest.mark.slow
def test_a_trained_student_stops_by_the_ids_it_learned_to_write(student, tmp_path, train_file):
    """`<|end|>` is what the teacher writes; in 30 steps the student learns to."""
    options = {
        "objective": {"type": "opd"},
        "max_steps": 30,
        "save_steps": 30,
        "health_tokens": 0,
        "prompts_per_step": 8,
    }
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": student}, **options)
    run_recipe(parse_recipe(tree))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["rollout/truncated/share"] < 0.5
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "student")
    assert saved.eos_token_id == [OWN, TEACHERS]
    tokenizer = load_miniature("base").tokenizer
    frozen = load_frozen(str(tmp_path / "run" / "student"), tokenizer, torch.device("cpu"), dtype=torch.float32)
    assert set(frozen.lm.stop_ids) >= {OWN, TEACHERS}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stop_ids"] == [OWN, TEACHERS]
