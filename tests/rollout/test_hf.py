"""Rollouts by transformers' generate: what is sampled, where it stops, what the model's own config may not change."""

import pytest
import torch
from torch.testing import assert_close

from conftest import load_miniature, miniature_recipe
from oprd.data.chat import render
from oprd.errors import ConfigError
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.recipe import parse_recipe
from oprd.rollout.hf import HFEngine
from oprd.train.setup import setup
from oprd.types import Message, Prompt

SAMPLING = Sampling(temperature=1.0, max_new_tokens=64, samples=2)


def prompts(lm: LanguageModel, texts: tuple[str, ...] = ("12+34-5", "1+2+3+4+5", "99-98+7")) -> tuple[Prompt, ...]:
    turns = [(Message(role="user", content=text),) for text in texts]
    return tuple(Prompt(row=i, messages=m, token_ids=render(lm.tokenizer, m)) for i, m in enumerate(turns))


def engine(lm: LanguageModel, **options: int) -> HFEngine:
    return HFEngine(FrozenModel(lm), **options)


def test_groups_follow_their_prompts_and_a_seed_gives_the_same_completions():
    lm = load_miniature("teacher")
    one, two = (engine(lm).generate(prompts(lm), SAMPLING, seed=3) for _ in range(2))
    assert one == two
    assert [p.row for p in one.prompts] == [0, 0, 1, 1, 2, 2]
    assert engine(lm).generate(prompts(lm), SAMPLING, seed=4) != one


def test_a_completion_does_not_depend_on_what_is_written_beside_it():
    """Two sets of weights that are compared answer every prompt with the same random numbers, whatever the batch."""
    lm = load_miniature("base")
    sampling = Sampling(temperature=1.5, max_new_tokens=64, samples=3)
    together = engine(lm).generate(prompts(lm), sampling, seed=3)
    assert engine(lm, cache_tokens=1).generate(prompts(lm), sampling, seed=3) == together  # one sequence at a time
    assert engine(lm, cache_tokens=260).generate(prompts(lm), sampling, seed=3) == together
    first = engine(lm).generate(prompts(lm)[:1], sampling, seed=3)
    assert first.completion_ids == together.completion_ids[:3]
    assert len(set(together.completion_ids)) == 9  # and no two draw the same numbers


def test_rows_that_have_ended_leave_the_batch():
    """Twelve rows of uneven length: each forward pass is at most twice as wide as what still writes."""
    lm = load_miniature("base")
    widths: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampling = Sampling(temperature=1.5, max_new_tokens=64, samples=4)
    lengths = engine(lm).generate(prompts(lm), sampling, seed=3).lengths
    steps = widths[1:]  # behind the prefill
    assert steps[0] == len(lengths)
    assert len(set(steps)) > 2
    for at, width in enumerate(steps):
        assert width < 2 * sum(length > at for length in lengths) + 1


def test_the_samples_of_a_prompt_share_its_prefill():
    lm = load_miniature("teacher")
    shapes: list[tuple[int, ...]] = []
    lm.model.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    longest = max(len(prompt.token_ids) for prompt in prompts(lm))
    engine(lm).generate(prompts(lm), Sampling(temperature=1.0, max_new_tokens=3, samples=4), seed=0)
    assert shapes == [(3, longest - 1), (12, 1), (12, 1), (12, 1)]


def test_under_bf16_a_copy_in_bfloat16_writes_with_the_weights_as_they_are(tmp_path, train_file):
    recipe = parse_recipe(miniature_recipe(tmp_path / "run", train_file) | {"bf16": True})
    parts = setup(recipe)
    student, greedy = parts.method.student, Sampling(temperature=0.0, max_new_tokens=24)
    parts.engine.sync_weights()
    before = parts.engine.generate(prompts(student.lm), greedy, seed=0)
    teacher = load_miniature("teacher").model
    with torch.no_grad():
        for mine, theirs in zip(student.lm.model.parameters(), teacher.parameters(), strict=True):
            mine.copy_(theirs)
    assert parts.engine.generate(prompts(student.lm), greedy, seed=0) == before
    parts.engine.sync_weights()
    after = parts.engine.generate(prompts(student.lm), greedy, seed=0)
    alone = LanguageModel(model=teacher.to(torch.bfloat16), tokenizer=student.lm.tokenizer, name="teacher")
    assert after.completion_ids == engine(alone).generate(prompts(alone), greedy, seed=0).completion_ids
    assert after != before
    writer = parts.method.student.writer()
    assert {p.dtype for p in writer.lm.model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in writer.lm.model.buffers()} == {torch.float32}, "rope stays exact"
    assert {p.dtype for p in student.lm.model.parameters()} == {torch.float32}


def test_the_callers_random_state_and_the_models_mode_are_left_as_they_were():
    lm = load_miniature("base")
    lm.model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = lm.model.generation_config
    engine(lm).generate(prompts(lm), SAMPLING, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert lm.model.training
    assert lm.model.generation_config is config


def test_a_completion_ends_with_its_stop_token_and_one_that_is_cut_is_marked_unfinished():
    lm = load_miniature("teacher")
    (stop,) = lm.stop_ids
    whole = engine(lm).generate(prompts(lm), SAMPLING, seed=0)
    for ids, finished in zip(whole.completion_ids, whole.finished, strict=True):
        assert finished
        assert ids[-1] == stop
        assert stop not in ids[:-1]
    cut = engine(lm).generate(prompts(lm), Sampling(temperature=1.0, max_new_tokens=5), seed=0)
    assert cut.max_new_tokens == 5
    assert cut.finished == (False, False, False)
    assert cut.lengths == (5, 5, 5)
    assert all(stop not in ids for ids in cut.completion_ids), "no end is invented"


def test_any_of_several_stop_tokens_ends_a_completion():
    lm = load_miniature("teacher")
    newline = lm.tokenizer("\n")["input_ids"][0]
    lm.model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, newline]
    rollouts = engine(lm).generate(prompts(lm), SAMPLING, seed=0)
    assert all(ids[-1] == newline for ids in rollouts.completion_ids)
    assert all(rollouts.finished)


def test_the_models_own_top_k_and_penalties_do_not_change_what_is_sampled():
    lm = load_miniature("base")
    plain = engine(lm).generate(prompts(lm), SAMPLING, seed=2)
    lm.model.generation_config.top_k = 1
    lm.model.generation_config.repetition_penalty = 2.0
    assert engine(lm).generate(prompts(lm), SAMPLING, seed=2) == plain


def test_left_padding_does_not_change_a_greedy_completion():
    lm = load_miniature("teacher")
    greedy = Sampling(temperature=0.0, max_new_tokens=64)
    together = engine(lm).generate(prompts(lm), greedy, seed=0)
    for i, prompt in enumerate(prompts(lm)):
        alone = engine(lm).generate((prompt,), greedy, seed=0)
        assert alone.completion_ids[0] == together.completion_ids[i]


def test_first_tokens_are_sampled_from_the_models_distribution():
    """2,000 first tokens at temperature 1 against the softmax, each frequent token within 4.5 standard errors."""
    lm = load_miniature("base")
    count = 2000
    two = Sampling(temperature=1.0, max_new_tokens=2, samples=count)
    (prompt,) = prompts(lm, texts=("57+88+91",))
    written = engine(lm, cache_tokens=10**6).generate((prompt,), two, seed=11).completion_ids
    firsts = torch.tensor([ids[0] for ids in written])
    common = int(firsts.mode().values)
    seconds = torch.tensor([ids[1] for ids in written if ids[0] == common])
    for ids, prefix in ((firsts, prompt.token_ids), (seconds, (*prompt.token_ids, common))):
        p = lm.model(input_ids=torch.tensor([prefix])).logits[0, -1].softmax(-1).detach()
        assert_close(p.sum(), torch.tensor(1.0))
        frequency = torch.bincount(ids, minlength=len(p)) / len(ids)
        likely = p > 5 / len(ids)
        error = (p * (1 - p) / len(ids)).sqrt()
        assert float(((frequency - p) / error)[likely].abs().max()) < 4.5


def test_a_cache_that_no_completion_fits_is_refused_before_anything_is_loaded(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file)
    tree["rollout"] |= {"engine": {"type": "hf", "cache_tokens": 50}}
    with pytest.raises(ConfigError, match=r"cache_tokens is 50, but the longest prompt .* take \d+ tokens; raise it"):
        setup(parse_recipe(tree))
