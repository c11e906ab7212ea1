"""Every supported family is trained as plain autograd on its own forward pass would train it."""

import copy
from dataclasses import replace

import pytest
import torch
from families_tiny import COARSE_IN_BF16, SUPPORTED, WITHOUT_BF16, make_model
from peft import LoraConfig, get_peft_model
from test_families import TOKENIZER, lm_of

from oprd.errors import ModelError
from oprd.models.families import starts_with_block_1, without_router_losses
from oprd.models.language_model import LanguageModel, train_mode
from oprd.models.loading import ModelFacts, load_frozen
from oprd.models.probe import check_bf16
from oprd.objectives.opd import OPD
from oprd.objectives.oprd import OPRD
from oprd.student import DistillModel
from oprd.types import Batch, HiddenSpec, Taps, Targets, TokenSelection

FAST = {"llama", "gemma3", "gemma4_text", "mixtral", "gpt2_dropout", "phimoe", "qwen3_5_text", "falcon_h1"}
PROMPTS, LENGTHS = (3, 5), (9, 4)

pytestmark = pytest.mark.filterwarnings("ignore")


def some(families, fast=FAST):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in families]


def batch_of():
    """Two rows, the second padded."""
    ids, mask = torch.full((2, 12), 257), torch.zeros(2, 12, dtype=torch.long)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        ids[row, : prompt + length] = torch.arange(30 + 50 * row, 30 + 50 * row + prompt + length)
        mask[row, : prompt + length] = 1
    return Batch(input_ids=ids, attention_mask=mask, prompt_lengths=PROMPTS, completion_lengths=LENGTHS)


def objectives(student):
    facts = ModelFacts.read(student.model, TOKENIZER)
    return OPRD(tokens="all").bind(facts), OPD().bind(facts)


def losses_of(student, teacher, batch):
    """One value per token, OPRD over all blocks and reverse KL summed."""
    model = DistillModel(student, objectives(student))
    with torch.no_grad():
        targets = Targets(teacher=teacher.tap(batch, model.taps))
    train_mode(model)
    return torch.stack(model(batch, targets)).sum(0)


def own_losses(student, teacher, batch, *, alone=True):
    """The same from the models' own forward passes, of each row alone or of the padded batch, by the definitions."""
    values, ends = [], [prompt + length for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    if alone:
        passes = [own_passes(student, teacher, batch.input_ids[row : row + 1, :end]) for row, end in enumerate(ends)]
    else:
        passes = [own_passes(student, teacher, batch.input_ids, batch.attention_mask)] * len(ends)
    for row, (prompt, end) in enumerate(zip(PROMPTS, ends, strict=True)):
        at, (ours, theirs) = 0 if alone else row, passes[row]
        blocks, first = student.num_blocks, 0 if starts_with_block_1(student.core.config) else 1
        pairs = [(ours.hidden_states[d], theirs.hidden_states[d]) for d in (*range(first, first + blocks - 1), -1)]
        distances = [(a.float() - b.float())[at, prompt:end].square().mean(-1) for a, b in pairs]
        log_p, log_q = (out.logits[at, prompt - 1 : end - 1].float().log_softmax(-1) for out in (ours, theirs))
        values.append(torch.stack(distances).mean(0) + (log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(values)


def own_passes(student, teacher, ids, mask=None):
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        theirs = teacher.core(**given)
    return student.core(**given), theirs


def gradients(model, values):
    model.zero_grad()
    values.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def assert_gradients_agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(float(x.abs().max()) for x in theirs.values())
    for name, gradient in theirs.items():
        off = float((ours[name] - gradient).abs().max())
        assert off <= 1e-3 * float(gradient.abs().max()) + 1e-5 * largest, (name, off)


def distance(ours, theirs):
    """Of two gradients, relative to the length of the second."""
    difference = {
        name: theirs.get(name, torch.zeros(())) - ours.get(name, torch.zeros(())) for name in {*ours, *theirs}
    }
    return (
        float(sum(x.square().sum() for x in difference.values()) / sum(x.square().sum() for x in theirs.values()))
        ** 0.5
    )


def two(family):
    """A student of the family, and a teacher with other weights."""
    teacher = make_model(family, seed=1)
    without_router_losses(teacher)
    return lm_of(family), LanguageModel(model=teacher.requires_grad_(False), tokenizer=TOKENIZER, name="teacher")


@pytest.mark.parametrize("family", some(SUPPORTED))
def test_losses_and_gradients_are_those_of_plain_autograd(family):
    student, teacher = two(family)
    batch = batch_of()
    expected = own_losses(student, teacher, batch)
    right = gradients(student.model, expected)
    if family not in WITHOUT_BF16:
        assert_bfloat16_agrees(student, teacher, right)
    for recompute in (False, True):
        if recompute:
            student.recompute_blocks()
        values = losses_of(student, teacher, batch)
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
        assert_gradients_agree(gradients(student.model, values), right)


def assert_bfloat16_agrees(student, teacher, exact):
    """With plain autograd in bfloat16, on the same padded rows; that with float32's, where bfloat16 is good for the family."""
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        expected, values = own_losses(student, teacher, batch, alone=False), losses_of(student, teacher, batch)
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-4)
    right = gradients(student.model, expected)
    assert distance(gradients(student.model, values), right) < 0.03
    assert distance(right, exact) < 0.25 or student.name in COARSE_IN_BF16


@pytest.mark.parametrize("family", ["llama", "mamba2", "nemotron_h", "deepseek_v3", "qwen3_next", "gemma3"])
def test_a_family_is_a_teacher_in_bfloat16(family, tmp_path):
    """Mamba 2 and Nemotron-H give logits in float32 that are no more exact than bfloat16."""
    make_model(family).save_pretrained(tmp_path)
    teacher = load_frozen(str(tmp_path), TOKENIZER, torch.device("cpu"), dtype=torch.bfloat16)
    assert teacher.lm.core.dtype == torch.bfloat16


@pytest.mark.parametrize("family", WITHOUT_BF16)
def test_a_family_that_fails_in_bfloat16_is_refused_at_the_start(family):
    lm = lm_of(family)
    writer = replace(lm, model=copy.deepcopy(lm.model))
    for parameter in writer.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(ModelError, match=f"{family}.*bf16 is true, but .* in bfloat16 fails: .*; set bf16: false"):
        check_bf16(lm, writer, lambda: torch.autocast("cpu", torch.bfloat16))


def test_an_adapters_dropout_acts_in_training_and_the_models_own_does_not():
    student, teacher = two("gpt2_dropout")
    adapted = get_peft_model(
        student.model, LoraConfig(r=4, lora_dropout=0.5, target_modules=["c_attn"], init_lora_weights=False)
    )
    noisy = LanguageModel(model=adapted, tokenizer=TOKENIZER, name="student")
    once, again = (losses_of(noisy, teacher, batch_of()) for _ in range(2))
    assert not torch.allclose(once, again)
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.p = 0.0
    once, again = (losses_of(noisy, teacher, batch_of()) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("family", ["phi3_longrope", "llama_dynamic_rope"])
def test_within_its_context_a_row_is_read_alike_beside_longer_ones(family):
    lm = lm_of(family)
    facts = ModelFacts.read(lm.model, TOKENIZER)
    assert facts.context == 32
    assert "rope would read every row by the longest one beside it" in facts.context_reason
    spec = HiddenSpec(block="last", at="token", tokens=TokenSelection())

    def states(*lengths):
        ids, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths))
        for row, length in enumerate(lengths):
            ids[row, :length], mask[row, :length] = torch.arange(30, 30 + length), 1
        completions = tuple(length - 2 for length in lengths)
        batch = Batch(
            input_ids=ids,
            attention_mask=mask.long(),
            prompt_lengths=(2,) * len(lengths),
            completion_lengths=completions,
        )
        with torch.no_grad():
            return lm.tap(batch, Taps(hidden=(spec,))).hidden[spec]

    torch.testing.assert_close(states(12, 32)[:10], states(12), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states(12, 33)[:10], states(12), rtol=1e-4, atol=1e-2), (
        "beyond it, the longest row decides"
    )
