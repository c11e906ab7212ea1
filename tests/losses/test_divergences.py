"""Every loss: a value worked out by hand, nothing for equal models, the sampled estimators on average."""

import math

import pytest
import torch
from torch.testing import assert_close

from estimators import ESTIMATORS, EXACT, exact, sampled
from oprd.losses import divergences as d


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_hidden_mse_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    # ((1-3)^2 + (2-1)^2) / 2 = 2.5 and (0 + 16) / 2 = 8
    assert_close(d.hidden_mse(student, teacher), torch.tensor([2.5, 8.0]))


def test_normalized_hidden_mse_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    # (0.6, 0.8) against (0, 1): (0.36 + 0.04) / 2
    assert_close(d.normalized_hidden_mse(student, teacher), torch.tensor([0.2]))


def test_reverse_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    # 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1) = 0.5108 nats
    assert_close(d.reverse_kl(p.log(), q.log()), torch.tensor([0.5108]), atol=1e-4, rtol=0)


def test_forward_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    # 0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5) = 0.3681 nats
    assert_close(d.forward_kl(p.log(), q.log()), torch.tensor([0.3681]), atol=1e-4, rtol=0)


def test_jsd_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    # m = (0.6, 0.4) with b = 0.25: 0.25 (0.9 ln 1.5 + 0.1 ln 0.25) + 0.75 (0.5 ln(0.5/0.6) + 0.5 ln(0.5/0.4))
    by_hand = 0.25 * (0.9 * math.log(1.5) + 0.1 * math.log(0.25))
    by_hand += 0.75 * (0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4))
    assert by_hand == pytest.approx(0.07188, abs=1e-5)
    assert_close(d.jsd(p.log(), q.log(), 0.25), torch.tensor([by_hand]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("estimate", "by_hand"),
    [
        (d.sampled_reverse_kl, math.log(0.5 / 0.2)),
        (d.sampled_forward_kl, 0.4 * math.log(0.4)),
        # m = 0.5 * 0.2 + 0.5 * 0.5 = 0.35
        (lambda p, q: d.sampled_jsd(p, q, 0.5), 0.5 * 0.4 * math.log(0.2 / 0.35) + 0.5 * math.log(0.5 / 0.35)),
    ],
    ids=["reverse_kl", "forward_kl", "jsd"],
)
def test_sampled_estimates_by_hand(estimate, by_hand):
    log_p, log_q = torch.tensor([0.5]).log(), torch.tensor([0.2]).log()
    assert_close(estimate(log_p, log_q), torch.tensor([by_hand]))


def test_top_k_renormalises_both_on_the_students_support_by_hand():
    p, q = torch.tensor([[0.6, 0.2, 0.2 - 1e-6, 1e-6]]), torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    value = d.reverse_kl(*d.on_top_k(p.log(), q.log(), 2, "student"))
    # support {0, 1}: p = (0.75, 0.25), q = (0.25, 0.75): 0.75 ln 3 + 0.25 ln(1/3) = 0.5493
    assert_close(value, torch.tensor([0.5 * math.log(3)]))


def test_top_k_overlap_keeps_only_what_both_have_and_an_empty_overlap_is_no_loss():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]]).log().requires_grad_()
    q = torch.tensor([[0.4, 0.05, 0.5, 0.05], [0.1, 0.1, 0.5, 0.3]]).log()
    for divergence in EXACT.values():
        value = divergence(*d.on_top_k(p, q, 2, "overlap"))
        # one shared token leaves no distribution to differ in, none leaves nothing
        assert_close(value, torch.zeros(2))
        (gradient,) = torch.autograd.grad(value.sum(), p)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_divergence_and_its_gradient_vanish_when_student_equals_teacher(name, logits):
    student, ids = logits.clone().requires_grad_(), torch.arange(6)
    value = ESTIMATORS[name](student, logits, ids)
    assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    if name == "forward_kl-sampled":
        # a single sample's gradient is -grad log p; only its mean over p vanishes (tested below)
        assert float(gradient.abs().max()) > 0
    else:
        assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("distance", [d.hidden_mse, d.normalized_hidden_mse])
def test_a_hidden_loss_and_its_gradient_vanish_when_student_equals_teacher(distance, logits):
    student = logits.clone().requires_grad_()
    value = distance(student, logits)
    value.sum().backward()
    assert_close(value, torch.zeros_like(value))
    assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_is_the_slope_of_the_value(name, temperature, logits):
    rows, teacher = exact(name, temperature), logits.flip(0)
    assert torch.autograd.gradcheck(lambda x: rows(x, teacher, torch.arange(6)), logits.clone().requires_grad_())


@pytest.mark.parametrize("name", EXACT)
def test_sampled_estimates_have_exactly_the_mean_of_the_exact_divergence(name, logits):
    """Summed over every token with its probability, value and gradient are the exact ones: no sampling error at all."""
    student, teacher = logits[:1].clone().requires_grad_(), logits[1:2]
    every = torch.arange(9)
    values = sampled(name)(student.expand(9, -1), teacher.expand(9, -1), every)
    probability = student.detach().softmax(-1).squeeze(0)
    expected = EXACT[name](student, teacher)
    assert_close((probability * values).sum(), expected.squeeze(0))
    (mean_gradient,) = torch.autograd.grad((probability * values).sum(), student)
    (exact_gradient,) = torch.autograd.grad(expected.sum(), student)
    assert_close(mean_gradient, exact_gradient)


@pytest.mark.parametrize("name", EXACT)
def test_sampled_gradients_average_to_the_exact_gradient_over_many_samples(name):
    """A statistical test at a fixed prefix: 40,000 sampled tokens, each component within 4.5 standard errors."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(1, 7, generator=generator, dtype=torch.float64)
    teacher = student + 0.7 * torch.randn(1, 7, generator=generator, dtype=torch.float64)
    count = 40_000
    ids = torch.multinomial(student.softmax(-1).squeeze(0), count, replacement=True, generator=generator)
    rows = student.expand(count, -1).clone().requires_grad_()
    (gradients,) = torch.autograd.grad(sampled(name)(rows, teacher.expand(count, -1), ids).sum(), rows)
    one = student.clone().requires_grad_()
    (exact_gradient,) = torch.autograd.grad(EXACT[name](one, teacher).sum(), one)
    standard_error = gradients.std(0) / count**0.5
    z = (gradients.mean(0) - exact_gradient.squeeze(0)) / standard_error
    assert float(z.abs().max()) < 4.5, z
    assert float((exact_gradient.abs() / standard_error).max()) > 20, "the test would not notice a missing gradient"


def test_importance_weights_by_hand():
    # p / p_then = 0.5 / 0.25 = 2, 0.2 / 0.4 = 0.5, 0.9 / 0.1 = 9 cut at 3
    now, then = torch.tensor([0.5, 0.2, 0.9]).log(), torch.tensor([0.25, 0.4, 0.1]).log()
    assert_close(d.importance_weights(now, then, 3.0), torch.tensor([2.0, 0.5, 3.0]))


def test_a_token_is_drawn_with_its_probability():
    logits = torch.tensor([0.5, 0.2, 0.3]).log().repeat(4, 1)
    # cumulative 0.5, 0.7, 1.0
    assert d.draw(logits, torch.tensor([0.0, 0.49, 0.51, 0.99])).tolist() == [0, 0, 1, 2]
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = d.draw(logits[:1].expand(20_000, 3), uniform).bincount(minlength=3) / 20_000
    assert_close(share, torch.tensor([0.5, 0.2, 0.3]), atol=0.01, rtol=0)
