"""OPD's three estimators and the likelihood of the teacher's text: what each objective makes of states and targets."""

import sys
import types

import pytest
import torch
from torch.testing import assert_close

from estimators import exact, sampled, top_k
from objectives.hand_made import (
    ROWS,
    SAMPLED,
    at_ids,
    facts,
    gradients,
    hidden_of,
    log_softmax_of,
    logits_of,
    rollouts,
    states,
)
from oprd.losses import divergences
from oprd.objectives import opd
from oprd.objectives.nll import NLL
from oprd.objectives.opd import OPD, OPDSampled, OPDTopK
from oprd.types import LogprobTargets, Targets, TokenSelection

DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "jsd": {"type": "jsd", "weight": 0.3}}
SELECTIONS = {"all": "all", "last": {"last": 2}}
LOST = ((0.0,) * 3, (1.0,) * 2)


@pytest.fixture(scope="module")
def student_facts():
    return facts()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_estimator_is_its_definition_in_value_and_gradient(name, student_facts):
    divergence = DIVERGENCES[name]
    for objective, definition in (
        (OPD(divergence=divergence, kl_temperature=2.0), exact(name, 2.0)),
        (OPDTopK(divergence=divergence, k=4), top_k(name, "student")),
        (OPDTopK(divergence=divergence, k=4, support="teacher"), top_k(name, "teacher")),
        (OPDTopK(divergence=divergence, k=4, support="overlap"), top_k(name, "overlap")),
        (OPDSampled(divergence=divergence), sampled(name)),
    ):
        student, teacher = states(0), states(1)
        value = objective.bind(student_facts).per_token(student, Targets(teacher=teacher))
        expected = definition(logits_of(student), logits_of(teacher), SAMPLED)
        assert_close(value, expected)
        for ours, theirs in zip(gradients(value, student), gradients(expected, student), strict=True):
            assert_close(ours, theirs)
        assert hidden_of(teacher).grad is None
        assert objective.metric == name


@pytest.mark.parametrize("tokens", SELECTIONS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_servers_log_probabilities_give_the_loss_of_a_local_teachers(name, tokens, student_facts):
    every = states(1)
    log_q = log_softmax_of(every).detach()
    top = log_q.topk(3)
    served = LogprobTargets(sampled=at_ids(log_q), top_ids=top.indices, top_logprobs=top.values)
    for kind, support in ((OPDSampled, {}), (OPDTopK, {"k": 3, "support": "teacher"})):
        objective = kind(divergence=DIVERGENCES[name], tokens=SELECTIONS[tokens], **support).bind(student_facts)
        student, teacher = (states(seed, objective.tokens) for seed in (0, 1))
        assert len(hidden_of(student)) == len(ROWS[objective.tokens])
        values = [objective.per_token(student, given) for given in (Targets(logprobs=served), Targets(teacher=teacher))]
        assert_close(*values)
        for ours, theirs in zip(*(gradients(value, student) for value in values), strict=True):
            assert_close(ours, theirs)


@pytest.mark.slow
def test_redrawn_tokens_estimate_the_exact_gradient_on_a_trajectory_the_student_did_not_write(student_facts):
    student, targets = states(0), Targets(teacher=states(1))
    wanted, _ = gradients(OPD().bind(student_facts).per_token(student, targets), student)
    redrawn = OPDSampled(redraw=True).bind(student_facts)
    torch.manual_seed(0)
    total = torch.zeros_like(wanted)
    for _ in range(1500):
        total += gradients(redrawn.per_token(student, targets), student)[0]
    assert float((total / 1500 - wanted).norm() / wanted.norm()) < 0.1


def test_completions_of_weight_0_count_in_no_mean(student_facts):
    objective = OPD().bind(student_facts)
    assert objective.weights(rollouts(token_weights=LOST)).tolist() == [0, 0, 0, 1, 1]
    assert objective.total_weight(rollouts(token_weights=LOST)) == 2
    by_sequence = OPD(reduction="sequence_mean").bind(student_facts)
    assert by_sequence.weights(rollouts(token_weights=LOST)).tolist() == [0, 0, 0, 0.5, 0.5]
    assert by_sequence.total_weight(rollouts(token_weights=LOST)) == 1


def test_the_likelihood_of_the_teachers_text_leaves_out_what_it_did_not_write(student_facts):
    student, objective = states(0), NLL().bind(student_facts)
    assert_close(objective.per_token(student, Targets()), -at_ids(log_softmax_of(student)))
    some = rollouts(rewritten=(False, True))
    assert objective.weights(some).tolist() == [0, 0, 0, 1, 1]
    assert objective.total_weight(some) == 2  # the tokens of the second
    assert objective.total_weight(rollouts()) == 0  # the student's own
    assert objective.total_weight(rollouts(written_by="teacher")) == 5


def test_the_likelihood_supervises_the_first_tokens_alone_when_asked(student_facts):
    first = NLL(tokens={"first": 1}).bind(student_facts)
    part = states(0, TokenSelection(keep="first", k=1))
    expected = NLL().bind(student_facts).per_token(states(0), Targets())[[0, 3]]
    assert_close(first.per_token(part, Targets()), expected)
    assert first.weights(rollouts(written_by="dataset")).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("factor", "used"), [(1.0, True), (1.01, False)])
def test_a_kernel_is_used_where_it_gives_the_definition(factor, used, monkeypatch, capfd):
    """A kernel that is wrong by one per cent on this device, or does not compile, is left aside, and that is said."""
    stub = types.ModuleType("oprd.losses.fused")
    stub.divergence = lambda p, q, teacher_share: factor * divergences.reverse_kl(p, q)
    monkeypatch.setitem(sys.modules, "oprd.losses.fused", stub)
    opd.kernel.cache_clear()
    found = opd.kernel(divergences.reverse_kl, 1.0, torch.device("cpu"))
    assert (found is not divergences.reverse_kl) == used
    said = "".join(capfd.readouterr())
    assert ("is not used" in said) != used
    opd.kernel.cache_clear()
