"""RIDE: the target by hand, OPRD at lambda 1, and which models may be its base."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import MODELS, miniature_recipe
from oprd.data.batching import collate
from oprd.errors import TeacherMismatch
from oprd.files import read_jsonl
from oprd.models.loading import ModelFacts
from oprd.objectives.oprd import OPRD
from oprd.objectives.ride import RIDE
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from oprd.types import HiddenSpec, HiddenStates, Targets, TokenSelection

ALL = TokenSelection()


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return ModelFacts.read(str(MODELS / "base"))


def states(values: list[list[list[float]]]) -> HiddenStates:
    """Blocks 1 and 2 at the tokens of one completion."""
    batch = collate([[1]], [[2] * len(values[0])], pad_id=0, device=torch.device("cpu"))
    hidden = {
        HiddenSpec(block=block, at="token", tokens=ALL): torch.tensor(rows, requires_grad=True)
        for block, rows in enumerate(values, start=1)
    }
    return HiddenStates(hidden=hidden, head=None, batch=batch)


def ride(facts: ModelFacts, extrapolation: float) -> RIDE:
    return RIDE(layers=(1, 2), tokens=ALL, extrapolation=extrapolation).bind(facts)


STUDENT = [[[0.0, 0.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]]
TEACHER = [[[1.0, 0.0], [1.0, 1.0]], [[2.0, 4.0], [0.0, 0.0]]]
BASE = [[[0.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]]


def test_the_target_goes_on_beyond_the_teacher_on_the_line_from_its_base(facts):
    # lambda 1.5: block 1 wants (1.5, 0) and (1.5, 1), block 2 wants (2, 6) and (0, 0)
    # mean squared differences: block 1: 1.125, 0.125; block 2: 18, 0; then the mean of both blocks
    targets = Targets(teacher=states(TEACHER), reference=states(BASE))
    assert_close(ride(facts, 1.5).per_token(states(STUDENT), targets), torch.tensor([9.5625, 0.0625]))


def test_lambda_1_is_oprd_exactly_in_values_and_gradients(facts):
    losses, gradients = [], []
    for objective in (OPRD(layers=(1, 2), tokens=ALL).bind(facts), ride(facts, 1.0)):
        student = states(STUDENT)
        loss = objective.per_token(student, Targets(teacher=states(TEACHER), reference=states(BASE)))
        gradients.append(torch.autograd.grad(loss.sum(), list(student.hidden.values())))
        losses.append(loss)
    assert torch.equal(*losses)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_neither_teacher_nor_base_get_gradient(facts):
    student, teacher, base = states(STUDENT), states(TEACHER), states(BASE)
    ride(facts, 1.25).per_token(student, Targets(teacher=teacher, reference=base)).sum().backward()
    assert all(h.grad is not None for h in student.hidden.values())
    assert all(h.grad is None for model in (teacher, base) for h in model.hidden.values())


@pytest.mark.slow
def test_a_run_at_lambda_1_gives_the_weights_of_oprd_and_the_initial_student_is_the_named_base(tmp_path, train_file):
    objectives = {
        "oprd": {"type": "oprd", "tokens": "all"},
        "ride-1": {"type": "ride", "tokens": "all", "extrapolation": 1.0},
        "ride": {"type": "ride", "tokens": "all"},
        "ride-named": {"type": "ride", "tokens": "all", "base": str(MODELS / "base")},
    }
    weights, losses = {}, {}
    for name, objective in objectives.items():
        changes = {"objective": objective, "max_steps": 2, "health_tokens": 0}
        run_recipe(parse_recipe(miniature_recipe(tmp_path / name, train_file, **changes)))
        weights[name] = load_file(tmp_path / name / "student" / "model.safetensors")
        losses[name] = read_jsonl(tmp_path / name / "metrics.jsonl")[0]["train/loss/mean"]
    for key, value in weights["oprd"].items():
        assert torch.equal(value, weights["ride-1"][key]), key
    assert losses["ride"] == pytest.approx(losses["ride-named"], rel=1e-6)  # both in the teacher's float32
    assert losses["ride"] > 1.2 * losses["oprd"]
    assert any(not torch.equal(value, weights["ride"][key]) for key, value in weights["oprd"].items())


def test_a_base_of_another_shape_or_tokenizer_is_refused_before_loading(facts):
    with pytest.raises(TeacherMismatch, match=r"objective\.base must be of the student's shape and tokenizer"):
        RIDE(base=str(MODELS / "wide_teacher")).bind(facts)
