"""The Triton kernel equals the definitions in value and gradient. test_fused.py runs this file in Triton's interpreter."""

import pytest
import torch
from torch.testing import assert_close

from objectives.hand_made import facts, gradients, states
from oprd.losses import fused
from oprd.losses.divergences import forward_kl, jsd, reverse_kl
from oprd.objectives import opd
from oprd.types import Targets

CASES = {
    "reverse_kl": (reverse_kl, 1.0),
    "forward_kl": (forward_kl, 0.0),
    "jsd": (lambda p, q: jsd(p, q, 0.3), 0.3),
}


@pytest.mark.parametrize("vocabulary", [64, 131])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_definitions(name, vocabulary, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 64)
    definition, share = CASES[name]
    draw = torch.Generator().manual_seed(0)
    student, teacher = (10 * torch.randn(7, vocabulary, generator=draw) for _ in range(2))
    student[0], student[1, 3] = teacher[0], 80.0  # equal rows; a probability of one
    student.requires_grad_()
    upstream = torch.rand(7, generator=draw)
    wanted, got = definition(student, teacher), fused.divergence(student, teacher, share)
    assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    slopes = [torch.autograd.grad((value * upstream).sum(), student)[0] for value in (got, wanted)]
    assert_close(*slopes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", {"type": "jsd", "weight": 0.3}])
def test_an_objective_gives_the_same_through_the_kernel(divergence, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 64)
    objective = opd.OPD(divergence=divergence, kl_temperature=2.0).bind(facts())
    student, targets = states(0), Targets(teacher=states(1))
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(opd, "has_kernel", lambda logits, kernel=kernel: kernel)
        value = objective.per_token(student, targets)
        found.append((value, *gradients(value, student)))
    assert_close(*found)
