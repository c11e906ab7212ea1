"""Truncated completions: every objective learns from what was sampled, and from no end that was invented."""

import pytest
import torch
from torch.testing import assert_close

from conftest import MODELS
from oprd.data.batching import student_batch
from oprd.data.chat import encode, render
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts
from oprd.objectives.base import Objective
from oprd.objectives.opd import OPD, OPDSampled, OPDTopK
from oprd.objectives.oprd import OPRD
from oprd.rollout.hf import HFEngine
from oprd.student import DistillModel
from oprd.teacher.local import LocalTeacher
from oprd.types import Message, Prompt, Rollouts

OBJECTIVES = {
    "oprd": OPRD(tokens="all"),
    "oprd-l2": OPRD(tokens="all", normalization="l2"),
    "reverse_kl": OPD(),
    "forward_kl": OPD(divergence="forward_kl"),
    "jsd": OPD(divergence="jsd"),
    "top_k": OPDTopK(),
    "sampled": OPDSampled(),
}
TEXT = "12+34=46\n46-5=41\n\\boxed{41}"


def values_of(objective: Objective, rollouts: Rollouts, base: LanguageModel, teacher: LanguageModel) -> torch.Tensor:
    """One value per supervised token."""
    model = DistillModel(base, [objective.bind(ModelFacts.read(str(MODELS / "base")))])
    targets = LocalTeacher(FrozenModel(teacher), context=512).targets(rollouts, model.taps)
    return model(student_batch(rollouts, pad_id=0, device=base.device), targets)[0].detach()


def rollouts_of(lm: LanguageModel, *lengths: int) -> Rollouts:
    """The same completion, cut at each of the lengths."""
    messages = (Message(role="user", content="12+34-5"),)
    ids = render(lm.tokenizer, messages)
    prompt = Prompt(row=0, messages=messages, token_ids=ids, teacher_messages=messages, teacher_token_ids=ids)
    whole = encode(lm.tokenizer, TEXT)
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
    objective = OBJECTIVES[name]
    first_tokens = type(objective).model_validate(objective.model_dump() | {"tokens": {"first": 7}})
    first = values_of(first_tokens, rollouts_of(base, 20), base, teacher_lm)
    short = values_of(objective, rollouts_of(base, 7), base, teacher_lm)
    assert_close(first, short, atol=1e-4, rtol=1e-4)


def test_the_engine_cuts_without_an_end(base):
    prompts = rollouts_of(base, 1).prompts
    sampling = Sampling(temperature=1.0, max_new_tokens=6, samples=4)
    written = HFEngine(FrozenModel(base)).generate(prompts, sampling, seed=0)
    assert written.lengths == (6,) * 4
    assert written.finished == (False,) * 4
    assert not any(stop in ids for ids in written.completion_ids for stop in base.stop_ids)
