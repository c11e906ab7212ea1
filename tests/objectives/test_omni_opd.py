"""OmniOPD's loss: values and gradients from its definition."""

import pytest
import torch
from torch.testing import assert_close

from objectives.hand_made import IDS, SAMPLED, N, at_ids, facts, gradients, hidden_of, log_softmax_of, rollouts, states
from oprd.errors import ConfigError
from oprd.objectives.omni_opd import OmniOPD
from oprd.recipe import parse_recipe
from oprd.types import Targets, TokenSelection

NAN = float("nan")
SCORES = ((NAN, 0.6, -0.4), (NAN, NAN))
"""Of a chunk of two tokens in the first completion."""
AUDITED = torch.tensor([False, True, True, False, False])


@pytest.fixture(scope="module")
def objective() -> OmniOPD:
    return OmniOPD(anchor=0.3).bind(facts())


def test_audited_chunks_are_reinforced_and_the_rest_is_anchored_values_and_gradients(objective):
    student, initial = states(0, token_scores=SCORES), states(1)
    value = objective.per_token(student, Targets(reference=initial))
    log_p, log_initial = log_softmax_of(student), log_softmax_of(initial).detach()
    kl = (log_initial.exp() * (log_initial - log_p)).sum(-1)
    scores = torch.tensor([0.0, 0.6, -0.4, 0.0, 0.0])
    expected = torch.where(AUDITED, -scores * at_ids(log_p), 0.3 * kl)
    assert_close(value, expected)
    for ours, theirs in zip(gradients(value, student), gradients(expected, student), strict=True):
        assert_close(ours, theirs)
    assert hidden_of(initial).grad is None


def test_the_loss_is_summed_over_tokens_and_divided_by_completions_whatever_was_lost(objective):
    for given in (rollouts(), rollouts(token_weights=((0.0,) * 3, (1.0,) * 2))):
        assert objective.total_weight(given) == 2
        assert objective.weights(given).tolist() == [1.0] * N


def test_without_an_anchor_no_reference_is_asked_and_nothing_outside_the_chunks_gets_gradient():
    objective = OmniOPD(anchor=0.0).bind(facts())
    assert not objective.reference_taps.hidden
    student = states(0, token_scores=((NAN,) * 3, (NAN,) * 2))
    value = objective.per_token(student, Targets())
    assert_close(value, torch.zeros(N))
    hidden_gradient, head_gradient = gradients(value, student)
    assert not hidden_gradient.any()
    assert not head_gradient.any()


def test_on_off_policy_completions_the_audited_tokens_are_importance_weighted_and_nothing_else():
    objective = OmniOPD(anchor=0.3).bind(facts())
    then = ((-3.0, -1.0, -9.0), (-2.0, -2.0))
    on_policy, off_policy = (states(0, token_scores=SCORES, **more) for more in ({}, {"sampling_logprobs": then}))
    targets = Targets(reference=states(1))
    now = at_ids(log_softmax_of(on_policy)).detach()
    weights = (now - torch.tensor([x for row in then for x in row])).exp().clamp(max=2.0)
    assert float(weights[2]) == 2.0
    plain = objective.per_token(on_policy, targets)
    assert objective.take_metrics() == ()
    assert_close(objective.per_token(off_policy, targets), torch.where(AUDITED, weights * plain, plain))
    (metric,) = objective.take_metrics()
    assert (metric.name, metric.count) == ("train/omni_opd/clipped/share", 2.0)  # of those that are weighted


def test_the_first_tokens_alone_are_supervised_when_asked():
    scores = ((0.5, 0.6, NAN), (NAN, 0.7))
    whole = OmniOPD(chunk_tokens=1, anchor=0.0).bind(facts())
    first = OmniOPD(chunk_tokens=1, anchor=0.0, tokens={"first": 1}).bind(facts())
    part = states(0, TokenSelection(keep="first", k=1), token_scores=scores)
    expected = whole.per_token(states(0, token_scores=scores), Targets())[[0, 3]]
    assert_close(first.per_token(part, Targets()), expected)
    assert first.weights(rollouts()).tolist() == [1.0, 1.0]
    assert int(SAMPLED[3]) == IDS[1][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": {"last": 50}}, "`tokens: all` or the `first` k"),
        ({"chunk_tokens": 51, "tokens": {"first": 50}}, "completions of 50 have room for none"),
        ({"chunk_tokens": 2000}, "completions of 1024 have room for none"),
        ({"audit": "random"}, "chunks start at the tokens of highest entropy"),
        ({"embedding_model": "m"}, "texts are compared by edit distance"),
    ],
)
def test_a_recipe_that_omni_opd_cannot_follow_is_refused_with_the_reason(changes, message):
    tree = {"student": {"model": "s"}, "teacher": {"type": "local", "model": "t"}, "data": {"prompts": "p"}}
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree | {"objective": {"type": "omni_opd"} | changes, "output_dir": "o"})
