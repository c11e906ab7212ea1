"""Where hidden states are tapped, on a two-block model built by hand; and what does not run."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import MODELS
from oprd.data.batching import collate
from oprd.errors import ConfigError, ModelError
from oprd.losses.chunked import logits
from oprd.losses.divergences import hidden_mse, reverse_kl
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts, check_finite
from oprd.models.probe import freeze_unreached
from oprd.objectives.base import Objective
from oprd.objectives.opd import OPD, OPDSampled, OPDTopK
from oprd.objectives.oprd import OPRD, select_blocks
from oprd.student import DistillModel
from oprd.types import ALL_TOKENS, Batch, HiddenSpec, HiddenStates, Taps, Targets, TokenSelection

CPU = torch.device("cpu")
EVERY_BLOCK = OPRD(tokens="all")


class AddOne(nn.Module):
    """A block whose output is its input plus one: states can be told by eye."""

    def forward(self, hidden: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden + 1.0


class ById(nn.Module):
    """An embedding that is the token's id in every dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.width = width

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None].float().expand(*ids.shape, self.width) + self.weight


class Double(nn.Module):
    """A final norm that doubles."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * hidden


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return ModelFacts.read(str(MODELS / "base"))


@pytest.fixture
def two_blocks(base) -> LanguageModel:
    """Embedding = id, block l adds one, the final norm doubles: state of block 1 is id + 1, of block 2 is 2 (id + 2)."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens = ById(4)
    model.model.layers = nn.ModuleList([AddOne(), AddOne()])
    model.model.norm = Double()
    return LanguageModel(model=model, tokenizer=base.tokenizer, name="by hand")


def two_rows() -> Batch:
    """Completions of two and of four tokens."""
    return collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]], pad_id=0, device=CPU)


def tokens(shift: int) -> tuple[list[int], list[int]]:
    """Row and position of each completion token of `two_rows`, `shift` to the left, worked out by hand."""
    return [0, 0, 1, 1, 1, 1], [at - shift for at in (3, 4, 2, 3, 4, 5)]


def specs(*blocks: int, at: str) -> tuple[HiddenSpec, ...]:
    return tuple(HiddenSpec(block=block, at=at, tokens=ALL_TOKENS) for block in blocks)


def test_block_1_is_tapped_before_the_final_norm_and_the_last_after_it_at_the_sampled_tokens(two_blocks):
    batch = collate([[10, 11]], [[20, 21]], pad_id=0, device=CPU)
    first, last = specs(1, 2, at="token")
    states = two_blocks.tap(batch, Taps(hidden=(first, last)))
    assert states.hidden[first][:, 0].tolist() == [21, 22]  # ids 20, 21 plus 1: the tokens' own positions, not shifted
    assert states.hidden[last][:, 0].tolist() == [2 * 22, 2 * 23]


def test_the_kl_family_taps_one_position_to_the_left(two_blocks):
    batch = collate([[10, 11]], [[20, 21]], pad_id=0, device=CPU)
    (spec,) = specs(2, at="predicting")
    states = two_blocks.tap(batch, Taps(hidden=(spec,)))
    assert states.hidden[spec][:, 0].tolist() == [2 * (11 + 2), 2 * (20 + 2)]


def test_oprd_is_the_mean_over_blocks_of_the_mean_squared_difference_by_hand(two_blocks, facts):
    objective = OPRD(layers=(1, 2), tokens={"last": 1}).bind(facts)
    assert objective.tokens == TokenSelection(keep="last", k=1)
    batch = collate([[10]], [[20, 21]], pad_id=0, device=CPU)
    states = two_blocks.tap(batch, objective.student_taps)
    off = {spec: value + spec.block for spec, value in states.hidden.items()}
    # blocks are off by 1 and 2 in every dimension: (1 + 4) / 2
    value = objective.per_token(states, Targets(teacher=HiddenStates(hidden=off, head=None, batch=batch)))
    assert_close(value, torch.tensor([2.5]))


def test_tapped_states_agree_with_hugging_faces_hidden_states(base):
    batch, taps = two_rows(), specs(1, 2, 3, 4, at="token")
    states = base.tap(batch, Taps(hidden=taps))
    out = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    for spec in taps:
        assert_close(states.hidden[spec], out.hidden_states[spec.block][tokens(0)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", (1, 2, 3, 4, 5)), ("last", (5,)), ("even", (2, 4)), ("odd", (1, 3, 5)), ((4, 2), (2, 4))],
)
def test_blocks_are_counted_from_one(layers, expected):
    assert select_blocks(layers, 5) == expected


def test_a_block_that_the_student_does_not_have_is_refused(facts):
    with pytest.raises(ConfigError, match="block 6; the student has blocks 1 to 4"):
        OPRD(layers=(2, 6)).bind(facts)


def test_a_top_k_beyond_the_vocabulary_is_refused(facts):
    with pytest.raises(ConfigError, match="k is 300; the vocabulary has 262"):
        OPDTopK(k=300).bind(facts)


def raising(what: str):
    def forward(*_: object, **__: object) -> None:
        raise AssertionError(f"{what} ran")

    return forward


def values_of(objective: Objective, facts: ModelFacts, student: LanguageModel, teacher: LanguageModel) -> torch.Tensor:
    """One value per supervised token of `two_rows`."""
    model = DistillModel(student, [objective.bind(facts)])
    targets = Targets(teacher=FrozenModel(teacher).hidden(two_rows(), model.taps))
    (values,) = model(two_rows(), targets)
    return values


def test_no_lm_head_runs_under_oprd(base, teacher_lm, facts):
    base.model.lm_head.forward = raising("the student's head")
    teacher_lm.model.lm_head.forward = raising("the teacher's head")
    values = values_of(EVERY_BLOCK, facts, base, teacher_lm)
    values.sum().backward()
    assert float(values.detach().sum()) > 0


def test_blocks_above_the_deepest_matched_one_do_not_run(base, teacher_lm, facts):
    for lm in (base, teacher_lm):
        for block in lm.blocks[2:]:
            block.forward = raising("a block above")
    values_of(OPRD(layers=(1, 2)), facts, base, teacher_lm).sum().backward()
    assert base.num_blocks == 4, "all blocks are back for the rollouts"
    with pytest.raises(AssertionError, match="a block above ran"):
        values_of(EVERY_BLOCK, facts, base, teacher_lm)
    assert base.num_blocks == 4


def test_every_parameter_that_is_left_trainable_gets_a_gradient(base, teacher_lm, facts):
    objective = OPRD(layers=(1, 2))
    freeze_unreached(base, objective.bind(facts).student_taps)
    values_of(objective, facts, base, teacher_lm).sum().backward()
    trainable = {name for name, p in base.model.named_parameters() if p.requires_grad}
    reached = {name for name, p in base.model.named_parameters() if p.grad is not None}
    assert trainable == reached
    assert not any("layers.3" in name or name == "model.norm.weight" for name in trainable)


@pytest.mark.parametrize("objective", [EVERY_BLOCK, OPD(), OPDTopK(), OPDSampled()], ids=lambda o: o.type)
def test_equal_models_have_no_loss_and_no_gradient(objective, base, facts):
    values = values_of(objective, facts, base, base)
    assert_close(values, torch.zeros_like(values), atol=1e-6, rtol=0)
    values.sum().backward()
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-4 for p in base.model.parameters())


def test_losses_through_the_models_agree_with_the_definition(base, teacher_lm, facts):
    batch = two_rows()
    ours, theirs = (
        lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        for lm in (base, teacher_lm)
    )
    kl = values_of(OPD(), facts, base, teacher_lm)
    assert_close(kl, reverse_kl(ours.logits[tokens(1)], theirs.logits[tokens(1)]), atol=1e-5, rtol=1e-4)
    oprd = values_of(OPRD(layers=(3,)), facts, base, teacher_lm)
    expected = hidden_mse(ours.hidden_states[3][tokens(0)], theirs.hidden_states[3][tokens(0)])
    assert_close(oprd, expected, atol=1e-5, rtol=1e-4)


def test_nan_weights_are_named(base):
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ModelError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        check_finite(base.model, "the student")


def test_a_head_that_is_not_a_plain_linear_map_is_refused(base):
    base.model.lm_head = nn.Sequential(base.model.lm_head)
    with pytest.raises(ModelError, match="the LM head is Sequential"):
        base.head()


def test_a_gemma_like_soft_cap_reaches_the_loss(base):
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=2.0,
        )
    ).eval()
    lm = LanguageModel(model=model, tokenizer=base.tokenizer, name="gemma")
    batch = collate([[1, 2]], [[3, 4]], pad_id=0, device=CPU)
    (spec,) = specs(2, at="predicting")
    states = lm.tap(batch, Taps(hidden=(spec,), head=True))
    expected = model(input_ids=batch.input_ids).logits[0, 1:3]
    assert_close(logits(states.hidden[spec], states.head), expected)
