"""Rollouts: what is sampled, where it stops, what the model's own generation config may not change."""

import torch
from torch.testing import assert_close

from conftest import load_miniature
from oprd.data.chat import render, stop_ids
from oprd.rollout.base import Sampling
from oprd.rollout.hf import HFEngine
from oprd.types import Message, Prompt, PromptBatch

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=64, samples=2)


def batch(lm, texts=("12+34-5", "1+2+3+4+5", "99-98+7")) -> PromptBatch:
    turns = [(Message(role="user", content=text),) for text in texts]
    return PromptBatch(
        prompts=tuple(Prompt(row=i, messages=m, token_ids=render(lm.tokenizer, m)) for i, m in enumerate(turns))
    )


def engine(lm, stops=None, **options) -> HFEngine:
    return HFEngine(lm, stops or stop_ids(lm.tokenizer, None), **{"max_sequences": 64} | options)


def test_groups_follow_their_prompts_and_a_seed_gives_the_same_completions():
    lm = load_miniature("teacher")
    one, two = (engine(lm).generate(batch(lm), SAMPLING, seed=3) for _ in range(2))
    assert one == two
    assert [p.row for p in one.prompts] == [0, 0, 1, 1, 2, 2]
    assert engine(lm).generate(batch(lm), SAMPLING, seed=4) != one


def test_a_batch_draws_alike_however_long_the_one_before_it_ran():
    """Two sets of weights that are compared answer every prompt with the same random numbers."""
    lm = load_miniature("base")
    sampling = Sampling(temperature=1.5, top_p=1.0, max_tokens=64, samples=1)
    first, other, second = (batch(lm, texts).prompts for texts in (("12+34-5",), ("1+2-3+4+5",), ("45+23-9+11-24",)))
    after_first, after_other = (
        engine(lm, max_sequences=1).generate(PromptBatch(prompts=(*before, *second)), sampling, seed=3)
        for before in (first, other)
    )
    alone = engine(lm, max_sequences=1).generate(PromptBatch(prompts=second), sampling, seed=3)
    assert after_first.lengths[0] != after_other.lengths[0]
    assert after_first.completion_ids[1] == after_other.completion_ids[1]
    assert after_first.completion_ids[1] != alone.completion_ids[0]  # and no two batches draw the same numbers


def test_the_callers_random_state_and_the_models_mode_are_left_as_they_were():
    lm = load_miniature("base")
    lm.model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = lm.model.generation_config
    engine(lm).generate(batch(lm), SAMPLING, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert lm.model.training
    assert lm.model.generation_config is config


def test_a_completion_ends_with_its_stop_token_and_one_that_is_cut_says_so():
    lm = load_miniature("teacher")
    (stop,) = stop_ids(lm.tokenizer, None)
    whole = engine(lm).generate(batch(lm), SAMPLING, seed=0)
    for ids, finished in zip(whole.completion_ids, whole.finished, strict=True):
        assert finished
        assert ids[-1] == stop
        assert stop not in ids[:-1]
    cut = engine(lm).generate(batch(lm), Sampling(temperature=1.0, top_p=1.0, max_tokens=5, samples=1), seed=0)
    assert cut.finished == (False, False, False)
    assert cut.lengths == (5, 5, 5)
    assert all(stop not in ids for ids in cut.completion_ids), "no end is invented"


def test_any_of_several_stop_tokens_ends_a_completion():
    lm = load_miniature("teacher")
    newline = lm.tokenizer("\n")["input_ids"][0]
    stops = tuple(sorted((*stop_ids(lm.tokenizer, None), newline)))
    rollouts = engine(lm, stops).generate(batch(lm), SAMPLING, seed=0)
    assert all(ids[-1] == newline for ids in rollouts.completion_ids)
    assert all(rollouts.finished)


def test_the_models_own_top_k_and_penalties_do_not_change_what_is_sampled():
    lm = load_miniature("base")
    plain = engine(lm).generate(batch(lm), SAMPLING, seed=2)
    lm.model.generation_config.top_k = 1
    lm.model.generation_config.repetition_penalty = 2.0
    assert engine(lm).generate(batch(lm), SAMPLING, seed=2) == plain


def test_left_padding_does_not_change_a_greedy_completion():
    lm = load_miniature("teacher")
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=64, samples=1)
    together = engine(lm).generate(batch(lm), greedy, seed=0)
    for i, prompt in enumerate(batch(lm).prompts):
        alone = engine(lm).generate(PromptBatch(prompts=(prompt,)), greedy, seed=0)
        assert alone.completion_ids[0] == together.completion_ids[i]


def test_first_tokens_are_sampled_from_the_models_distribution():
    """4,000 first tokens at temperature 1 against the softmax, each frequent token within 4.5 standard errors."""
    lm = load_miniature("base")
    count = 4000
    one = Sampling(temperature=1.0, top_p=1.0, max_tokens=2, samples=count)
    prompts = batch(lm, texts=("57+88+91",))
    rollouts = engine(lm, max_sequences=count).generate(prompts, one, seed=11)
    seconds = torch.tensor([ids[1] for ids in rollouts.completion_ids if len(ids) == 2])
    firsts = torch.tensor([ids[0] for ids in rollouts.completion_ids])
    prompt = torch.tensor([prompts.prompts[0].token_ids])
    p_first = lm.model(input_ids=prompt).logits[0, -1].softmax(-1).detach()
    common = int(firsts.mode().values)
    p_second = lm.model(input_ids=torch.cat([prompt, torch.tensor([[common]])], 1)).logits[0, -1].softmax(-1).detach()
    for ids, p in ((firsts, p_first), (seconds[firsts[: len(seconds)] == common], p_second)):
        frequency = torch.bincount(ids, minlength=len(p)) / len(ids)
        likely = p > 5 / len(ids)
        error = (p * (1 - p) / len(ids)).sqrt()
        assert float(((frequency - p) / error)[likely].abs().max()) < 4.5
    assert_close(p_first.sum(), torch.tensor(1.0))
