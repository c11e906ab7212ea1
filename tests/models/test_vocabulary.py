"""Token ids and rows of the embedding: padding rows are never sampled, nor ids a teacher lacks; tokens without a row are refused."""

import pytest
import torch

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.clock import Clock
from oprd.errors import ModelError
from oprd.models.generate import Sampling, generate
from oprd.models.language_model import FrozenModel
from oprd.models.loading import ModelFacts
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import Rollouts

ROWS, DIGITS = slice(262, 272), slice(15, 25)


def padded(folder):
    """The base model with 300 rows, ten of which are as probable as the digits."""
    lm = load_miniature("base")
    lm.model.resize_token_embeddings(300, mean_resizing=False)
    with torch.no_grad():
        weight = lm.model.get_input_embeddings().weight
        weight[ROWS] = weight[DIGITS] * 1.3
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return lm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_are_never_sampled(temperature, tmp_path):
    lm = padded(tmp_path)
    prompts = [tuple(lm.tokenizer(text)["input_ids"]) for text in ("1+2=", "33+4=")]
    sampling = Sampling(temperature=temperature, max_new_tokens=12, samples=8)
    with torch.no_grad():
        asked = torch.tensor(prompts[:1])
        assert int(lm.model(asked).logits[0, -1].argmax()) >= 262  # they would be
    found = generate(FrozenModel(lm), prompts, sampling, seeds=range(16), cache_tokens=10**6)
    assert max(max(ids) for ids in found) < 262


def test_a_student_with_more_rows_than_its_teacher_trains(tmp_path, train_file):
    padded(tmp_path / "m")
    for objective in ({"type": "opd"}, {"type": "opd_sampled"}, {"type": "oprd", "tokens": "all"}):
        tree = miniature_recipe(
            tmp_path / objective["type"],
            train_file,
            student={"model": str(tmp_path / "m")},
            objective=objective,
            max_steps=1,
        )
        run_recipe(parse_recipe(tree))


def test_a_token_that_a_teacher_has_no_row_for_is_not_sampled(tmp_path, train_file):
    """Gemma 3's tokenizer has one token more than its smallest model has rows."""
    lm, shorter = padded(tmp_path / "student"), load_miniature("teacher")
    for model, folder in ((lm, "student"), (shorter, "teacher")):
        model.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        model.model.save_pretrained(tmp_path / folder)
        model.tokenizer.save_pretrained(tmp_path / folder)
    assert lm.tokenizer.convert_tokens_to_ids("<image>") == 262
    assert 262 not in lm.unsampled_ids
    models = {"student": {"model": str(tmp_path / "student")}}
    models["teacher"] = {"type": "local", "model": str(tmp_path / "teacher"), "dtype": "float32"}
    parts = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, **models)))
    assert parts.method.student.lm.unsampled_ids == tuple(range(262, 300))


def test_a_token_that_a_teacher_of_another_tokenizer_has_no_row_for_is_read_as_its_letters(tmp_path, train_file):
    lm, student = load_miniature("base"), load_miniature("wide_teacher").tokenizer
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    for part in (lm.model, lm.tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    models = {"student": {"model": str(MODELS / "wide_teacher")}, "objective": {"type": "opd_sampled"}}
    models["teacher"] = {"type": "local", "model": str(tmp_path / "teacher"), "dtype": "float32"}
    parts = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, **models)))
    ids = tuple(student("a<image>b")["input_ids"])
    given = Rollouts(prompts=(parts.prompts[0],), completion_ids=(ids,), finished=(True,))
    (alignment,) = parts.method.annotate(given).alignments
    assert lm.tokenizer.convert_ids_to_tokens(alignment.teacher_ids) == list("a<image>b")
    assert len(alignment.student_index) == len(ids)
    assert parts.method.update(parts.method.annotate(given), 1, Clock(torch.device("cpu"))).finite


def test_pad_and_template_tokens_without_a_row_are_refused(tmp_path):
    lm = load_miniature("base")
    lm.tokenizer.add_special_tokens({"pad_token": "<|PAD2|>"})
    with pytest.raises(ModelError, match=r"'<\|PAD2\|>' is token 262, but the embedding has 262 rows"):
        ModelFacts.read(lm.model, lm.tokenizer)
    lm = load_miniature("base")
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    ModelFacts.read(lm.model, lm.tokenizer)  # nothing writes it
    lm.tokenizer.chat_template = "<|turn|>{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match=r"'<\|turn\|>' is token 262"):
        ModelFacts.read(lm.model, lm.tokenizer)
