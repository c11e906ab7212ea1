"""OPRD's conventions on a two-block model built by hand, and what does not run."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from oprd.algorithm import DistillModel
from oprd.config.objectives import HiddenMSEConfig, OutputKLConfig
from oprd.data.collate import collate
from oprd.errors import ConfigError, ModelError
from oprd.kernels.chunked import logits
from oprd.kernels.reference import hidden_mse, reverse_kl
from oprd.models import LanguageModel, check_finite, freeze_unused, read_states
from oprd.objectives import build_objectives
from oprd.objectives.hidden import select_blocks
from oprd.types import HiddenTargets, Reading, TokenSelection

ALL = TokenSelection(keep="all")
CPU = torch.device("cpu")


class AddOne(nn.Module):
    """A block whose output is its input plus one: states can be told by eye."""

    def forward(self, hidden: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden + 1.0


class ById(nn.Module):
    """An embedding that is the token's id, in every dimension but the last."""

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


@pytest.fixture
def two_blocks() -> LanguageModel:
    """Embedding = id, block l adds one, the final norm doubles: state of block 1 is id + 1, of block 2 is 2 (id + 2)."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens = ById(4)
    model.model.layers = nn.ModuleList([AddOne(), AddOne()])
    model.model.norm = Double()
    return LanguageModel(model=model, tokenizer=None, name="by hand")  # type: ignore[arg-type]


def test_block_1_is_read_before_the_final_norm_and_the_last_after_it_at_the_sampled_tokens(two_blocks):
    batch = collate([[10, 11]], [[20, 21]], pad_id=0, device=CPU)
    first, last = (Reading(block=b, at="completion", tokens=ALL) for b in (1, 2))
    states = read_states(two_blocks, batch, [first, last], head=False)
    assert states.hidden[first][:, 0].tolist() == [21, 22]  # ids 20, 21 plus 1: the tokens' own positions, not shifted
    assert states.hidden[last][:, 0].tolist() == [2 * 22, 2 * 23]


def test_the_kl_family_reads_one_position_to_the_left(two_blocks):
    batch = collate([[10, 11]], [[20, 21]], pad_id=0, device=CPU)
    reading = Reading(block=2, at="prediction", tokens=ALL)
    states = read_states(two_blocks, batch, [reading], head=False)
    assert states.hidden[reading][:, 0].tolist() == [2 * (11 + 2), 2 * (20 + 2)]


def test_oprd_is_the_mean_over_blocks_of_the_mean_squared_difference_by_hand(two_blocks):
    (objective,) = build_objectives(HiddenMSEConfig(tokens="last"), blocks=2, vocabulary=100)
    batch = collate([[10]], [[20, 21]], pad_id=0, device=CPU)
    states = read_states(two_blocks, batch, objective.readings, head=False)
    off = {reading: value + reading.block for reading, value in states.hidden.items()}
    # blocks are off by 1 and 2 in every dimension: (1 + 4) / 2
    value = objective.per_token(states, HiddenTargets(hidden=off, head=None))
    assert_close(value, torch.tensor([2.5]))


def test_reading_agrees_with_hugging_faces_hidden_states(base):
    batch = collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]], pad_id=0, device=CPU)
    readings = [Reading(block=b, at="completion", tokens=ALL) for b in range(1, 5)]
    states = read_states(base, batch, readings, head=False)
    out = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    for reading in readings:
        expected = out.hidden_states[reading.block][batch.completion_mask(ALL)]
        assert_close(states.hidden[reading], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", (1, 2, 3, 4, 5)), ("last", (5,)), ("even", (2, 4)), ("odd", (1, 3, 5)), ((4, 2), (2, 4))],
)
def test_blocks_are_counted_from_one(layers, expected):
    assert select_blocks(layers, 5) == expected


def test_a_block_that_the_student_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="block 6; the student has blocks 1 to 5"):
        select_blocks((2, 6), 5)


def test_a_top_k_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="top_k is 300; the vocabulary has 262"):
        build_objectives(OutputKLConfig(estimator="top_k", top_k=300), blocks=4, vocabulary=262)


def raising(what: str):
    def forward(*_: object, **__: object) -> None:
        raise AssertionError(f"{what} ran")

    return forward


def losses_of(objective_config, student: LanguageModel, teacher: LanguageModel) -> tuple[torch.Tensor, ...]:
    vocabulary = len(student.tokenizer)
    objectives = build_objectives(objective_config, blocks=student.num_blocks, vocabulary=vocabulary)
    model = DistillModel(student, objectives)
    batch = collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]], pad_id=0, device=CPU)
    with torch.no_grad():
        states = read_states(teacher, batch, model.readings, head=model.uses_head)
    return model(batch, HiddenTargets(hidden=states.hidden, head=states.head))


def test_no_lm_head_runs_under_oprd(base, teacher_lm):
    base.model.lm_head.forward = raising("the student's head")
    teacher_lm.model.lm_head.forward = raising("the teacher's head")
    (values,) = losses_of(HiddenMSEConfig(), base, teacher_lm)
    values.sum().backward()
    assert float(values.detach().sum()) > 0


def test_blocks_above_the_deepest_matched_one_do_not_run(base, teacher_lm):
    for lm in (base, teacher_lm):
        for block in lm.blocks[2:]:
            block.forward = raising("a block above")
    (values,) = losses_of(HiddenMSEConfig(layers=(1, 2)), base, teacher_lm)
    values.sum().backward()
    assert base.num_blocks == 4, "all blocks are back for the rollouts"
    with pytest.raises(AssertionError, match="a block above ran"):
        losses_of(HiddenMSEConfig(layers="all"), base, teacher_lm)


def test_every_parameter_that_is_left_trainable_gets_a_gradient(base, teacher_lm):
    freeze_unused(base, 2, head=False)
    (values,) = losses_of(HiddenMSEConfig(layers=(1, 2)), base, teacher_lm)
    values.sum().backward()
    trainable = {name for name, p in base.model.named_parameters() if p.requires_grad}
    reached = {name for name, p in base.model.named_parameters() if p.grad is not None}
    assert trainable == reached
    assert not any("layers.3" in name or name == "model.norm.weight" for name in trainable)


def test_equal_models_have_no_loss_and_no_gradient(base):
    for config in (HiddenMSEConfig(), OutputKLConfig(), OutputKLConfig(estimator="sampled")):
        (values,) = losses_of(config, base, base)
        assert_close(values, torch.zeros_like(values), atol=1e-6, rtol=0)
        values.sum().backward()
        assert all(p.grad is None or float(p.grad.abs().max()) < 1e-4 for p in base.model.parameters())
        base.model.zero_grad()


def test_losses_through_the_models_agree_with_the_reference(base, teacher_lm):
    batch = collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]], pad_id=0, device=CPU)
    ours, theirs = (
        lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        for lm in (base, teacher_lm)
    )
    (kl,) = losses_of(OutputKLConfig(), base, teacher_lm)
    before = batch.prediction_mask(ALL)
    assert_close(kl, reverse_kl(ours.logits[before], theirs.logits[before]), atol=1e-5, rtol=1e-4)
    (oprd,) = losses_of(HiddenMSEConfig(layers=(3,)), base, teacher_lm)
    at = batch.completion_mask(ALL)
    assert_close(oprd, hidden_mse(ours.hidden_states[3][at], theirs.hidden_states[3][at]), atol=1e-5, rtol=1e-4)


def test_nan_weights_are_named(base):
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ModelError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        check_finite(base.model, "the student")


def test_a_head_that_is_not_a_plain_linear_map_is_refused(base):
    base.model.lm_head = nn.Sequential(base.model.lm_head)
    with pytest.raises(ModelError, match="the LM head is Sequential"):
        base.head()


def test_a_gemma_like_soft_cap_reaches_the_loss():
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
    lm = LanguageModel(model=model, tokenizer=None, name="gemma")  # type: ignore[arg-type]
    batch = collate([[1, 2]], [[3, 4]], pad_id=0, device=CPU)
    reading = Reading(block=2, at="prediction", tokens=ALL)
    states = read_states(lm, batch, [reading], head=True)
    expected = model(input_ids=batch.input_ids).logits[batch.prediction_mask(ALL)]
    assert_close(logits(states.hidden[reading], states.head), expected)
