"""Importance weights of stale rollouts: what they mend, where they stand, and who needs none."""

import pytest
import torch
from torch.testing import assert_close

from objectives.test_truncated import objective_of
from oprd.data.collate import collate
from oprd.errors import ConfigError
from oprd.kernels.chunked import logits, sampled_logprobs
from oprd.kernels.reference import importance_weights, reverse_kl, sampled_reverse_kl, token_logprobs
from oprd.objectives import build_objectives
from oprd.types import HiddenTargets, LMHead, Rollouts, States, TokenSelection

CPU = torch.device("cpu")


def test_importance_weights_by_hand():
    # p / p_then = 0.5 / 0.25 = 2, 0.2 / 0.4 = 0.5, 0.9 / 0.1 = 9 cut at 3
    now, then = torch.tensor([0.5, 0.2, 0.9]).log(), torch.tensor([0.25, 0.4, 0.1]).log()
    assert_close(importance_weights(now, then, 3.0), torch.tensor([2.0, 0.5, 3.0]))


def test_weighted_stale_tokens_give_the_exact_value_and_gradient_of_reverse_kl():
    """Summed over every token with the probability it was written with: an expectation without sampling noise."""
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


@pytest.fixture
def states():
    """(objective tree, logprobs) -> its values on two completions of random states."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 8, generator=generator) for _ in range(2))
    head = LMHead(weight=torch.randn(20, 8, generator=generator))

    def values(tree, logprobs):
        (objective,) = build_objectives(objective_of(tree), blocks=2, vocabulary=20)
        batch = collate([[1, 2], [3]], [[4, 5, 6], [7, 8]], pad_id=0, device=CPU, logprobs=logprobs)
        (reading,) = objective.readings
        mine = States(hidden={reading: student}, head=head, batch=batch)
        return objective.per_token(mine, HiddenTargets(hidden={reading: teacher}, head=head)), batch, student, head

    return values


def test_the_sampled_estimator_is_weighted_token_by_token(states):
    tree = {"type": "opd", "estimator": "sampled"}
    plain, batch, student, head = states(tree, None)
    ids = batch.sampled_ids(TokenSelection(keep="all"))
    now = token_logprobs(logits(student, head), ids)
    assert_close(sampled_logprobs(student, head, ids), now)
    # written with half, with a tenth and with the same probability: weights 2, 10 cut to 2, 1, and two of 1/2
    then = now - torch.tensor([2.0, 10.0, 1.0, 0.5, 0.5]).log()
    weighted, *_ = states(tree, (tuple(then[:3].tolist()), tuple(then[3:].tolist())))
    assert_close(weighted, plain * torch.tensor([2.0, 2.0, 1.0, 0.5, 0.5]))


@pytest.mark.parametrize(
    "tree", [{"type": "opd"}, {"type": "opd", "divergence": "jsd"}, {"type": "opd", "estimator": "top_k"}]
)
def test_a_sum_over_the_vocabulary_needs_no_weights(tree, states):
    plain, *_ = states(tree, None)
    weighted, *_ = states(tree, ((-9.0, -9.0, -9.0), (-9.0, -9.0)))
    assert_close(plain, weighted)


def test_log_probabilities_follow_their_tokens(base):
    rollouts = Rollouts(
        prompts=(None,) * 2, completion_ids=((4, 5, 6), (7, 8)), finished=(True, True),
        logprobs=((-1.0, -2.0, -3.0), (-4.0, -5.0)),
    )  # fmt: skip
    swapped = rollouts.take((1, 0))
    batch = collate([[1], [1]], swapped.completion_ids, pad_id=0, device=CPU, logprobs=swapped.logprobs)
    assert batch.rollout_logprobs(TokenSelection(keep="all")).tolist() == [-4, -5, -1, -2, -3]
    assert batch.rollout_logprobs(TokenSelection(keep="last_k", k=2)).tolist() == [-4, -5, -2, -3]


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"type": "opd", "importance_clip": 2.0}, "no meaning with estimator='full'"),
        ({"type": "opd", "estimator": "sampled", "importance_clip": 2.0}, "no rollout is stale"),
    ],
)
def test_a_clip_that_nothing_reads_is_refused(tree, told):
    with pytest.raises(ConfigError, match=told):
        objective_of(tree)
