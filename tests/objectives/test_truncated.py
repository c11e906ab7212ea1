"""Truncated completions: every objective learns from what was sampled, and from no end that was invented."""

import pytest
import torch
from torch.testing import assert_close

from oprd.algorithm import DistillModel
from oprd.config.objectives import ObjectiveConfig
from oprd.config.reading import parse_recipe
from oprd.data.collate import collate
from oprd.models import LanguageModel
from oprd.objectives import build_objectives
from oprd.rollout.base import Sampling
from oprd.rollout.hf import HFEngine
from oprd.teacher.local import LocalTeacher
from oprd.types import Message, Prompt, PromptBatch, Rollouts

OBJECTIVES = {
    "oprd": {"type": "oprd", "tokens": "all"},
    "oprd-l2": {"type": "oprd", "tokens": "all", "normalization": "l2"},
    "reverse_kl": {"type": "opd"},
    "forward_kl": {"type": "opd", "divergence": "forward_kl"},
    "jsd": {"type": "opd", "divergence": "jsd"},
    "top_k": {"type": "opd", "estimator": "top_k"},
    "sampled": {"type": "opd", "estimator": "sampled"},
}
TEXT = "12+34=46\n46-5=41\n\\boxed{41}"


def objective_of(tree: dict[str, object]) -> ObjectiveConfig:
    base = {"student": {"model": "s"}, "teacher": {"type": "local", "model": "t"}, "data": {"prompts": "p"}}
    return parse_recipe(base | {"objective": tree, "output_dir": "o"}).objective


def values_of(tree: dict[str, object], rollouts: Rollouts, base: LanguageModel, teacher: LanguageModel) -> torch.Tensor:
    """One value per supervised token."""
    objectives = build_objectives(objective_of(tree), blocks=base.num_blocks, vocabulary=200)
    model = DistillModel(base, objectives)
    targets = LocalTeacher(teacher, context=512).targets(rollouts, model.readings, head=model.uses_head)
    batch = collate([p.token_ids for p in rollouts.prompts], rollouts.completion_ids, pad_id=0, device=base.device)
    return model(batch, targets)[0].detach()


def rollouts_of(lm: LanguageModel, *lengths: int) -> Rollouts:
    """The same completion, cut at each of the lengths."""
    messages = (Message(role="user", content="12+34-5"),)
    ids = lm.tokenizer.apply_chat_template([{"role": "user", "content": "12+34-5"}], add_generation_prompt=True)
    prompt = Prompt(row=0, messages=messages, token_ids=tuple(ids["input_ids"]))
    whole = tuple(lm.tokenizer(TEXT)["input_ids"])
    return Rollouts(
        prompts=(prompt,) * len(lengths),
        completion_ids=tuple(whole[:n] for n in lengths),
        finished=(False,) * len(lengths),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_truncated_completion_counts_as_the_first_part_of_the_whole(name, base, teacher_lm):
    values = values_of(OBJECTIVES[name], rollouts_of(base, 20, 7), base, teacher_lm)
    assert len(values) == 27  # 20 + 7 sampled tokens, no end-of-text
    assert_close(values[20:], values[:7], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_supervising_the_first_part_of_a_longer_completion_is_the_same_as_a_shorter_one(name, base, teacher_lm):
    first = values_of(OBJECTIVES[name] | {"tokens": "first_k", "k": 7}, rollouts_of(base, 20), base, teacher_lm)
    short = values_of(OBJECTIVES[name] | {"tokens": "all"}, rollouts_of(base, 7), base, teacher_lm)
    assert_close(first, short, atol=1e-4, rtol=1e-4)


def test_the_engine_cuts_without_an_end(base):
    stop = (base.tokenizer.eos_token_id,)
    prompt = rollouts_of(base, 1).prompts
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=6, samples=4)
    engine = HFEngine(base, stop, max_sequences=4)
    written = engine.generate(PromptBatch(prompts=prompt), sampling, seed=0)
    assert written.lengths == (6,) * 4
    assert written.finished == (False,) * 4
    assert not any(stop[0] in ids for ids in written.completion_ids)
