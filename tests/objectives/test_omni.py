"""OmniOPD's loss and the likelihood of the teacher's text."""

from dataclasses import replace
from functools import partial

import torch
from torch.testing import assert_close

from oprd.config.objectives import OmniOPDConfig, OutputKLConfig, RewrittenConfig
from oprd.data.collate import collate
from oprd.kernels.reference import draw
from oprd.objectives import build_objectives
from oprd.objectives.kl import OutputKL
from oprd.objectives.omni import OmniOPD
from oprd.objectives.rewritten import RewrittenNLL
from oprd.types import (
    ChunkTargets,
    HiddenTargets,
    LMHead,
    Lost,
    NotRewritten,
    Prompt,
    Reading,
    Rollouts,
    SampledTargets,
    States,
    TextTargets,
    TokenSelection,
    TopKTargets,
)

ALL = TokenSelection(keep="all")
READING = Reading(block="last", at="prediction", tokens=ALL)
V, D = 7, 5
IDS = [[3, 1, 4], [1, 5]]
BATCH = collate([[0], [0, 2]], IDS, pad_id=0, device=torch.device("cpu"))
N = 5


def states(seed: int, reading: Reading = READING, n: int = N) -> States:
    draw = torch.Generator().manual_seed(seed)
    head = LMHead(weight=torch.randn(V, D, generator=draw).requires_grad_())
    hidden = torch.randn(n, D, generator=draw).requires_grad_()
    return States(hidden={reading: hidden}, head=head, batch=BATCH)


def logprobs(of: States) -> torch.Tensor:
    return (of.hidden[READING] @ of.head.weight.T).log_softmax(-1)


def rollouts(*answers) -> Rollouts:
    prompts = tuple(Prompt(row=i, messages=(), token_ids=(0,)) for i in range(2))
    return Rollouts(
        prompts=prompts, completion_ids=tuple(map(tuple, IDS)), finished=(True, True), answers=answers or None
    )


def test_omni_reinforces_inside_chunks_and_anchors_outside_values_and_gradients():
    student, start = states(0), states(1)
    audited = torch.tensor([False, True, True, False, False])
    scores = torch.tensor([0.0, 0.6, 0.6, 0.0, 0.0])
    targets = ChunkTargets(audited=audited, scores=scores, start=HiddenTargets(hidden=start.hidden, head=start.head))
    objective = OmniOPD(OmniOPDConfig(anchor=0.3), blocks=2, vocabulary=V)
    value = objective.per_token(student, targets)
    log_p, log_start = logprobs(student), logprobs(start).detach()
    sampled = log_p.gather(-1, torch.tensor([3, 1, 4, 1, 5])[:, None])[:, 0]
    kl = (log_start.exp() * (log_start - log_p)).sum(-1)
    expected = torch.where(audited, -scores * sampled, 0.3 * kl)
    assert_close(value, expected)
    inputs = (student.hidden[READING], student.head.weight)
    for ours, theirs in zip(
        torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert_close(ours, theirs)
    assert start.hidden[READING].grad is None


def test_omni_is_summed_over_tokens_and_divided_by_completions():
    objective = OmniOPD(OmniOPDConfig(), blocks=2, vocabulary=V)
    assert objective.divisor(rollouts()) == 2
    assert objective.weights(rollouts(Lost(reason="x"), None)) == (1.0, 1.0)


def test_without_an_anchor_nothing_outside_the_chunks_gets_gradient():
    student = states(0)
    targets = ChunkTargets(audited=torch.zeros(N, dtype=torch.bool), scores=torch.zeros(N), start=None)
    value = OmniOPD(OmniOPDConfig(anchor=0.0), blocks=2, vocabulary=V).per_token(student, targets)
    value.sum().backward()
    assert_close(value, torch.zeros(N))
    assert_close(student.hidden[READING].grad, torch.zeros(N, D))


def test_omni_on_stale_completions_weighs_what_it_reinforces_and_nothing_else():
    student, start = states(0), states(1)
    then = ((-3.0, -1.0, -9.0), (-2.0, -2.0))
    stale = replace(student, batch=replace(BATCH, logprobs=then))
    audited = torch.tensor([False, True, True, False, False])
    scores = torch.tensor([0.0, 0.6, -0.4, 0.0, 0.0])
    targets = ChunkTargets(audited=audited, scores=scores, start=HiddenTargets(hidden=start.hidden, head=start.head))
    objective = OmniOPD(OmniOPDConfig(), blocks=2, vocabulary=V)
    now = logprobs(student).gather(-1, torch.tensor([3, 1, 4, 1, 5])[:, None])[:, 0].detach()
    weights = (now - torch.tensor([x for row in then for x in row])).exp().clamp(max=2.0)
    assert float(weights[2]) == 2.0
    fresh = objective.per_token(student, targets)
    assert objective.tallies() == ()
    assert_close(objective.per_token(stale, targets), torch.where(audited, weights * fresh, fresh))
    (tally,) = objective.tallies()
    assert (tally.name, tally.of) == ("train/omni_opd/clipped/share", 2.0)  # of those it weighs


def test_omni_and_the_likelihood_supervise_the_first_tokens_alone_when_asked():
    audited = torch.tensor([True, True, False, False, True])
    scores = torch.tensor([0.5, 0.6, 0.0, 0.0, 0.7])
    for make, config, targets in (
        (OmniOPD, partial(OmniOPDConfig, chunk_tokens=1), ChunkTargets(audited=audited, scores=scores, start=None)),
        (RewrittenNLL, RewrittenConfig, TextTargets()),
    ):
        whole = make(config(), blocks=2, vocabulary=V)
        first = make(config(tokens="first_k", k=1), blocks=2, vocabulary=V)
        (reading,) = first.readings
        every = states(0)
        part = States(hidden={reading: every.hidden[READING][[0, 3]]}, head=every.head, batch=BATCH)
        assert_close(first.per_token(part, targets), whole.per_token(every, targets)[[0, 3]])
        assert first.supervised(rollouts()) == (1, 1)


def test_the_likelihood_of_the_teachers_text_leaves_out_what_it_did_not_write():
    student = states(0)
    objective = RewrittenNLL(RewrittenConfig(), blocks=2, vocabulary=V)
    value = objective.per_token(student, TextTargets())
    assert_close(value, -logprobs(student).gather(-1, torch.tensor([3, 1, 4, 1, 5])[:, None])[:, 0])
    own = rollouts(NotRewritten(reason="empty"), None)
    assert objective.weights(own) == (0.0, 1.0)
    assert objective.divisor(own) == 2  # the tokens of the second


def test_completions_whose_answer_was_lost_have_no_weight_in_opd():
    (objective,) = build_objectives(OutputKLConfig(), blocks=2, vocabulary=V)
    assert objective.weights(rollouts(Lost(reason="no reply"), None)) == (0.0, 1.0)
    assert objective.divisor(rollouts(Lost(reason="no reply"), None)) == 2


def test_served_targets_give_the_loss_of_local_ones_whatever_tokens_are_selected():
    teacher = states(1)
    log_q = logprobs(teacher).detach()
    top = log_q.topk(3)
    served = {
        "sampled": SampledTargets(logprobs=log_q.gather(-1, torch.tensor([3, 1, 4, 1, 5])[:, None])[:, 0]),
        "top_k": TopKTargets(ids=top.indices, logprobs=top.values),
    }
    for tokens, k, rows in (("all", None, [0, 1, 2, 3, 4]), ("last_k", 2, [1, 2, 3, 4])):
        for divergence in ("reverse_kl", "forward_kl", "jsd"):
            for estimator, targets in served.items():
                support = {"top_k": 3, "support": "teacher"} if estimator == "top_k" else {}
                config = OutputKLConfig(divergence=divergence, estimator=estimator, tokens=tokens, k=k, **support)
                objective = OutputKL(config, blocks=2, vocabulary=V)
                (reading,) = objective.readings
                student = states(0, reading, len(rows))
                local = HiddenTargets(hidden={reading: teacher.hidden[READING][rows]}, head=teacher.head)
                ours, theirs = (objective.per_token(student, given) for given in (targets, local))
                assert_close(ours, theirs)
                grads = [torch.autograd.grad(x.sum(), student.hidden[reading])[0] for x in (ours, theirs)]
                assert_close(*grads)


def test_a_token_is_drawn_with_its_probability():
    logits = torch.tensor([0.5, 0.2, 0.3]).log().repeat(4, 1)
    # cumulative 0.5, 0.7, 1.0
    assert draw(logits, torch.tensor([0.0, 0.49, 0.51, 0.99])).tolist() == [0, 0, 1, 2]
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = draw(logits[:1].expand(20_000, 3), uniform).bincount(minlength=3) / 20_000
    assert_close(share, torch.tensor([0.5, 0.2, 0.3]), atol=0.01, rtol=0)


def test_redrawn_tokens_estimate_the_exact_gradient_on_a_trajectory_the_student_did_not_write():
    student, teacher = states(0), states(1)
    local = HiddenTargets(hidden=teacher.hidden, head=teacher.head)
    exact = OutputKL(OutputKLConfig(), blocks=2, vocabulary=V).per_token(student, local)
    (wanted,) = torch.autograd.grad(exact.sum(), student.hidden[READING])
    redrawn = OutputKL(OutputKLConfig(estimator="sampled", redraw=True), blocks=2, vocabulary=V)
    torch.manual_seed(0)
    total = torch.zeros_like(wanted)
    for _ in range(1500):
        total += torch.autograd.grad(redrawn.per_token(student, local).sum(), student.hidden[READING])[0]
    assert float((total / 1500 - wanted).norm() / wanted.norm()) < 0.1
