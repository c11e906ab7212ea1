"""EffOPD's arithmetic and decisions: what moves, by how much, and when it stays."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.distributed import Ranks
from oprd.effopd import EffOPDConfig, Extrapolation, Scores, movable_weights, paired_p_value, search
from oprd.errors import ConfigError, DataError, TrainingStopped
from oprd.models.language_model import LanguageModel
from oprd.models.loading import LoraSection, StudentConfig, load_student
from oprd.recipe import parse_recipe
from oprd.train.setup import setup
from train.runs import update, weights

ALWAYS = EffOPDConfig(validation_prompts=1)


@pytest.fixture
def by_hand() -> LanguageModel:
    """One block whose every weight is 1."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return LanguageModel(model=model, tokenizer=load_miniature("base").tokenizer, name="by hand")


def extrapolation(lm: LanguageModel) -> Extrapolation:
    return Extrapolation(ALWAYS, lm, Ranks(Accelerator()), lambda: None)


def add(lm: LanguageModel, amount: float) -> None:
    """As an optimizer's update does, move every weight."""
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(amount)


def scripted(*means: float):
    """Scores given in advance: the plain weights' first, then each candidate's."""
    left = list(means)
    return lambda *_: Scores(values=(left.pop(0),), tokens=10)


# The arithmetic


def test_candidates_by_hand(by_hand):
    effopd = extrapolation(by_hand)
    add(by_hand, 0.5)  # 1 to 1.5: delta = 0.5
    seen = []

    def score() -> Scores:
        seen.append(by_hand.blocks[0].mlp.up_proj.weight[0, 0].item())
        return Scores(values=(0.0,), tokens=1)

    effopd.after_update(1, score)
    assert seen == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]  # 1.5 + 2k * 0.5, k = 0..5
    assert by_hand.blocks[0].mlp.up_proj.weight[0, 0].item() == 6.5
    add(by_hand, 0.25)
    seen.clear()
    effopd.after_update(2, score)
    assert seen[:2] == [6.75, 7.25]  # delta is counted from the accepted weights, not from before them


def test_only_attention_and_mlp_weights_move(by_hand):
    effopd = extrapolation(by_hand)
    add(by_hand, 0.5)
    effopd.after_update(1, scripted(0, 1, 0))
    values = {name: value.flatten()[0].item() for name, value in by_hand.model.named_parameters()}
    moved = {name for name, value in values.items() if value == 2.5}
    assert moved == {n for n in values if ".self_attn." in n or ".mlp." in n}
    assert {n for n in values if n not in moved} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
    assert all(values[n] == 1.5 for n in values if n not in moved)


def test_norms_of_every_name_and_frozen_weights_stay(base):
    class GatedRMSNormOfAKind(torch.nn.LayerNorm):
        pass

    base.blocks[0].self_attn.gate = GatedRMSNormOfAKind(4)
    names = set(movable_weights(base))
    assert "1.self_attn.q_proj.weight" in names
    assert not any("norm" in name or "gate." in name for name in names)
    for parameter in base.blocks[3].parameters():
        parameter.requires_grad_(False)
    assert {name.partition(".")[0] for name in movable_weights(base)} == {"1", "2", "3"}


def test_of_a_lora_student_the_adapter_moves(base):
    model = load_student(StudentConfig(model=str(MODELS / "base"), lora=LoraSection(r=2)))
    lm = LanguageModel(model=model, tokenizer=base.tokenizer, name="lora")
    names = movable_weights(lm)
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    before = {name: value.clone() for name, value in lm.model.named_parameters()}
    effopd = extrapolation(lm)
    with torch.no_grad():
        for value in names.values():
            value.add_(0.5)
    effopd.after_update(1, scripted(0, 1, 0))
    for name, value in lm.model.named_parameters():
        assert_close(value, before[name] + (1.5 if value.requires_grad else 0.0), msg=name)


def test_when_no_candidate_is_accepted_the_step_is_a_plain_one_bit_for_bit(tmp_path, train_file):
    parts = setup(parse_recipe(miniature_recipe(tmp_path, train_file)))
    student = parts.method.student
    effopd = extrapolation(student.lm)
    update(parts)
    plain = weights(parts)
    moments = {id(p): [v.clone() for v in state.values()] for p, state in student.optimizer.state.items()}
    found = effopd.after_update(1, scripted(1.0, 0.5))
    assert found is not None
    assert found["accepted"] == 0.0
    assert all(torch.equal(value, plain[name]) for name, value in weights(parts).items())
    for parameter, state in student.optimizer.state.items():
        assert all(torch.equal(a, b) for a, b in zip(state.values(), moments[id(parameter)], strict=True))


def test_without_movement_there_is_no_search(by_hand):
    effopd = extrapolation(by_hand)
    assert effopd.after_update(1, lambda: pytest.fail("scored")) is None  # a warm-up that starts at zero


# The decisions


@pytest.mark.parametrize(
    ("scores", "accepted", "tried"),
    [
        ((0.4, 0.3), 0, 1),
        ((0.4, 0.4, 0.3), 2, 2),  # a tie is enough
        ((0.4, 0.5, 0.45), 2, 2),  # the first that is not stops the search, however good it is against the start
        ((0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 10, 5),
        ((0.4, 0.5, 0.6, 0.5), 4, 3),
        ((0.4, float("nan")), 0, 1),
        ((-math.inf, -math.inf), 0, 1),
        ((0.4, math.inf), 0, 1),
    ],
)
def test_the_search_goes_on_while_the_score_does_not_fall(scores, accepted, tried):
    found = search(EffOPDConfig(), scripted(*scores))
    assert found.accepted == accepted
    assert [c.factor for c in found.candidates] == [2, 4, 6, 8, 10][:tried]
    assert found.tokens == 10 * (tried + 1)
    assert found.score == scores[0]


def test_where_better_is_asked_for_an_equal_score_is_not_enough():
    assert search(EffOPDConfig(accept="better"), scripted(0.4, 0.4)).accepted == 0
    assert search(EffOPDConfig(accept="better"), scripted(0.4, 0.41, 0.41)).accepted == 2


@pytest.mark.parametrize("samples", [3, 5, 10])
def test_as_many_right_answers_on_other_prompts_are_a_tie(samples):
    draw = torch.Generator().manual_seed(samples)
    right = torch.randint(0, samples + 1, (50,), generator=draw)
    for _ in range(50):
        again = right[torch.randperm(50, generator=draw)]
        both = [tuple((x / samples).tolist()) for x in (right.double(), again.double())]
        for config, accepted in ((ALWAYS, 2.0), (EffOPDConfig(accept="better"), 0.0)):
            left = [*both, (0.0,) * 50]
            found = search(config, lambda _, left=left: Scores(values=left.pop(0), tokens=0))
            assert found.accepted == accepted


def test_the_paired_test_by_hand():
    # four prompts each better by 1: of the 16 choices of signs one is as good, p = 1/16
    assert paired_p_value((0.0,) * 4, (1.0,) * 4) == pytest.approx(1 / 16, abs=0.01)
    # +1, +1, -1: sums of 3 signs are at least 1 in half of the cases
    assert paired_p_value((0.0, 0.0, 1.0), (1.0, 1.0, 0.0)) == pytest.approx(1 / 2, abs=0.02)
    assert paired_p_value((0.1, 0.2), (0.1, 0.2)) == 1.0
    assert paired_p_value((0.0,), (float("nan"),)) == 1.0


def test_under_chance_the_paired_test_accepts_at_its_level():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((400, 2, 50), generator=generator).round()
    p = torch.tensor([paired_p_value(a.tolist(), b.tolist()) for a, b in scores])
    # 5% of 400, standard deviation 1.1%; discrete differences make it conservative
    assert 0.01 < float((p <= 0.05).float().mean()) < 0.085


def test_paired_acceptance_wants_more_than_a_better_mean():
    def search_with(gains: list[int]) -> float:
        left = [(0.0,) * 20, tuple(map(float, gains)), (0.0,) * 20]
        return search(EffOPDConfig(accept="paired"), lambda _: Scores(values=left.pop(0), tokens=0)).accepted

    assert search_with([1] + [0] * 19) == 0.0  # p = 1/2
    assert search_with([1] * 4 + [0] * 16) == 0.0  # p = 1/16
    assert search_with([1] * 6 + [0] * 14) == 2.0  # p = 1/64


def test_searches_follow_the_powers_of_two_or_every_n_steps():
    assert [t for t in range(1, 20) if EffOPDConfig().is_trigger(t)] == [1, 2, 4, 8, 16]
    assert [t for t in range(1, 20) if EffOPDConfig(every=5).is_trigger(t)] == [5, 10, 15]


def test_ranks_that_decide_differently_stop_the_run_before_one_of_them_goes_on(by_hand, monkeypatch):
    ranks = Ranks(Accelerator())
    monkeypatch.setattr(ranks, "all_gather", lambda row: torch.tensor([list(row), [0.0]]))
    effopd = Extrapolation(ALWAYS, by_hand, ranks, lambda: None)
    add(by_hand, 0.5)
    with pytest.raises(TrainingStopped, match="step 1: ranks accepted different candidates"):
        effopd.after_update(1, scripted(0, 1))  # the plain update's and the first candidate's; a third would raise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triggers": "every_n"}, r"extrapolation\.triggers: unknown key of an earlier version: give `every: n`"),
        (
            {"accept_ties": False},
            "accept_ties: unknown key of an earlier version: use accept: not_worse, better or paired",
        ),
        ({"factors": [4.0, 2.0]}, "factors must rise"),
        ({"factors": []}, "factors must rise and be at least one"),
        ({"accept": "paired", "validation_prompts": 4}, r"gives no p below 0\.062, so nothing is ever accepted"),
    ],
)
def test_a_senseless_combination_is_refused(options, message, tmp_path, train_file):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(miniature_recipe(tmp_path, train_file, extrapolation=options))


def test_missing_prompts_or_answers_are_named_before_anything_is_loaded(tmp_path, train_file):
    with pytest.raises(ConfigError, match="validation_prompts is 99, the dataset has 64"):
        setup(parse_recipe(miniature_recipe(tmp_path, train_file, extrapolation={"validation_prompts": 99})))
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"problem": f"{i}+1"}) + "\n" for i in range(60)))
    with pytest.raises(DataError, match=r"has no 'answer' \(data\.answer\); set extrapolation\.score=objective"):
        setup(parse_recipe(miniature_recipe(tmp_path / "run", bare, extrapolation={})))
