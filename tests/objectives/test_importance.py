"""Importance weights of off-policy rollouts: what they correct, where they stand, and who needs none."""

import pytest
import torch
from torch.testing import assert_close

from objectives.hand_made import SAMPLED, facts, hidden_of, logits_of, rollouts, states
from oprd.data.batching import student_batch
from oprd.errors import ConfigError
from oprd.losses.chunked import logprobs_of
from oprd.losses.divergences import importance_weights, reverse_kl, sampled_reverse_kl, token_logprobs
from oprd.objectives.opd import OPD, OPDSampled, OPDTopK
from oprd.recipe import parse_recipe
from oprd.types import ALL_TOKENS, Targets, TokenSelection


def test_weighted_off_policy_tokens_give_the_exact_value_and_gradient_of_reverse_kl():
    """Summed over every token with the probability it was sampled with: an expectation without sampling noise."""
    generator = torch.Generator().manual_seed(0)
    student, then, teacher = (torch.randn(1, 12, generator=generator, dtype=torch.float64) for _ in range(3))
    student.requires_grad_()
    exact = reverse_kl(student, teacher)
    (expected,) = torch.autograd.grad(exact.sum(), student)
    ids = torch.arange(12)
    rows = student.expand(12, -1)
    log_p, log_q = token_logprobs(rows, ids), token_logprobs(teacher.expand(12, -1), ids)
    log_then = token_logprobs(then.expand(12, -1), ids)
    weights = importance_weights(log_p, log_then, float("inf"))
    values = log_then.exp() * weights * sampled_reverse_kl(log_p, log_q)
    (found,) = torch.autograd.grad(values.sum(), student)
    assert_close(values.sum(), exact.sum())
    assert_close(found, expected)
    # and without the weights it is another gradient
    log_p = token_logprobs(student.expand(12, -1), ids)
    (biased,) = torch.autograd.grad((log_then.exp() * sampled_reverse_kl(log_p, log_q)).sum(), student)
    assert float((biased - expected).norm() / expected.norm()) > 0.1


def test_the_mean_of_weighted_samples_is_unbiased_and_the_clip_bounds_it():
    generator = torch.Generator().manual_seed(1)
    p, then = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    drawn = torch.multinomial(then, 40_000, replacement=True, generator=generator)
    weights = importance_weights(p[drawn].log(), then[drawn].log(), float("inf"))
    # E w = 1, with standard error sqrt(sum p^2/then - 1) / 200 = 0.0045
    assert float(weights.mean()) == pytest.approx(1.0, abs=0.02)
    clipped = importance_weights(p[drawn].log(), then[drawn].log(), 1.5)
    # 0.3 * 1.5 + 0.3 * 2/3 + 0.4 * 0.25
    assert float(clipped.mean()) == pytest.approx(0.75, abs=0.02)
    assert float(clipped.max()) == 1.5


def test_the_sampled_estimator_is_weighted_token_by_token_and_counts_what_the_clip_cuts():
    objective, targets, student = OPDSampled().bind(facts()), Targets(teacher=states(1)), states(0)
    now = token_logprobs(logits_of(student), SAMPLED).detach()
    assert_close(logprobs_of(hidden_of(student), student.head, SAMPLED), now)
    # sampled with half, with a tenth and with the same probability: weights 2, 10 cut to 2, 1, and two of 1/2
    then = (now - torch.tensor([1.99, 10.0, 1.0, 0.5, 0.5]).log()).tolist()
    plain = objective.per_token(student, targets)
    assert objective.take_metrics() == ()
    weighted = objective.per_token(states(0, sampling_logprobs=(tuple(then[:3]), tuple(then[3:]))), targets)
    assert_close(weighted, plain * torch.tensor([1.99, 2.0, 1.0, 0.5, 0.5]))
    (metric,) = objective.take_metrics()
    assert (metric.name, metric.sum, metric.count) == ("train/reverse_kl/clipped/share", 1.0, 5)


@pytest.mark.parametrize("objective", [OPD(), OPD(divergence="jsd"), OPDTopK()])
def test_a_sum_over_the_vocabulary_needs_no_weights(objective):
    bound, targets = objective.bind(facts()), Targets(teacher=states(1))
    assert not objective.importance_weighted
    off_policy = states(0, sampling_logprobs=((-9.0, -9.0, -9.0), (-9.0, -9.0)))
    assert_close(bound.per_token(off_policy, targets), bound.per_token(states(0), targets))


def test_sampled_tokens_need_weights_unless_they_are_drawn_again():
    assert OPDSampled().importance_weighted
    assert not OPDSampled(redraw=True).importance_weighted


def test_log_probabilities_follow_their_tokens():
    swapped = rollouts(sampling_logprobs=((-1.0, -2.0, -3.0), (-4.0, -5.0))).take((1, 0))
    batch = student_batch(swapped, pad_id=0, device=torch.device("cpu"))
    assert batch.ragged(batch.sampling_logprobs, ALL_TOKENS).tolist() == [-4, -5, -1, -2, -3]
    assert batch.ragged(batch.sampling_logprobs, TokenSelection(keep="last", k=2)).tolist() == [-4, -5, -2, -3]


def test_a_clip_in_a_recipe_is_refused_with_the_place_of_the_constant():
    tree = {"student": {"model": "s"}, "teacher": {"type": "local", "model": "t"}, "data": {"prompts": "p"}}
    with pytest.raises(ConfigError, match=r"it is a constant of losses/importance\.py"):
        parse_recipe(tree | {"objective": {"type": "opd_sampled", "importance_clip": 2.0}, "output_dir": "o"})
