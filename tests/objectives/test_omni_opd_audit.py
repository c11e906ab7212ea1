"""OmniOPD's audit: chunks, what the teacher is asked, targets, baselines, and what happens to lost answers."""

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.data.chat import decode, encode, render
from oprd.distributed import Ranks
from oprd.errors import ServerError
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts
from oprd.objectives.base import StepContext
from oprd.objectives.omni_opd import (
    Chunk,
    OmniOPD,
    edit_similarity,
    leave_one_out,
    place_chunks,
)
from oprd.recipe import parse_recipe
from oprd.teacher.base import Chains, GenerationRequest, Generations, Teacher
from oprd.teacher.local import LocalTeacher
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import Message, Prompt, Rollouts, Taps, Targets

TEXTS = ("12+34=46\n46-5=41\n\\boxed{41}", "1+2", "", "7+5=12\n12-9=3\n\\boxed{3}")
FEW = {"chunk_tokens": 5, "chunks": 3, "continuations": 4}
OMNI = {"type": "omni_opd"} | FEW


def test_chunks_begin_at_the_highest_entropies_and_never_overlap_or_run_over_the_end():
    entropy = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7, 0.3, 0.95, 0.0])
    order = entropy.argsort(descending=True).tolist()  # 6 1 2 4 5 3 0 7
    # 6 + 3 > 8; 1 is taken; 2 overlaps it; 4 is taken; 5 and 3 overlap; 0 overlaps 1
    assert place_chunks(order, 8, chunk_tokens=3, most=10) == (1, 4)
    assert place_chunks(order, 8, chunk_tokens=3, most=1) == (1,)
    assert place_chunks(order, 8, chunk_tokens=9, most=10) == ()


@settings(deadline=None)  # a busy machine
@given(st.permutations(range(30)), st.integers(0, 30), st.integers(1, 12), st.integers(1, 6))
def test_whatever_the_order_chunks_are_whole_and_apart(order, length, chunk, most):
    starts = place_chunks(order, length, chunk_tokens=chunk, most=most)
    assert len(starts) <= most
    assert all(start + chunk <= length for start in starts)
    assert all(b - a >= chunk for a, b in itertools.pairwise(starts))


def test_the_target_by_hand():
    # k = 0.5 + 1 + 0 = 1.5, pi_bar = exp(-0.5) = 0.6065, alpha = 1: (1.5 + 0.6065) / 4
    chunk = Chunk(row=0, start=0, similarities=(0.5, 1.0, 0.0), mean_logprob=-0.5)
    assert chunk.target(1.0) == pytest.approx(0.52663, abs=1e-5)
    assert chunk.target(0.0) == pytest.approx(0.5)


def test_leave_one_out_by_hand():
    # the first completion against the second's 0.9, the second against (0.2 + 0.4) / 2, the third has no partner
    alone = leave_one_out([0.2, 0.4, 0.9, 0.5], completions=[0, 0, 1, 2], prompts=[0, 0, 0, 1])
    assert alone == pytest.approx([-0.7, -0.5, 0.6, 0.0])


def test_edit_similarity_by_hand():
    # kitten to sitting: 3 edits over 7 characters
    assert edit_similarity("kitten", ["sitting", "kitten", ""]) == pytest.approx([4 / 7, 1.0, 0.0])
    assert edit_similarity("", [""]) == [1.0]


class Recording(Teacher):
    """Hands requests on and keeps them; loses the answers whose number is in `lose`, or stops."""

    def __init__(self, inner: Teacher, lose: frozenset[int], stopped: bool) -> None:
        self.inner, self.lose, self.stopped = inner, lose, stopped
        self.asked: list[list[GenerationRequest]] = []

    def targets(self, rollouts: Rollouts, taps: Taps) -> Targets:
        return self.inner.targets(rollouts, taps)

    def generate(self, chains: Chains) -> Generations:
        if self.stopped:
            raise ServerError("the budget is spent")
        self.asked = [list(chain) for chain in chains]
        numbers = itertools.count()
        return [[None if next(numbers) in self.lose else a for a in row] for row in self.inner.generate(chains)]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Rollouts before and after `annotate`, and who took part."""

    objective: OmniOPD
    student: LanguageModel
    teacher: Recording
    before: Rollouts
    after: Rollouts

    @property
    def chunks(self) -> list[dict[int, float]]:
        """Start -> score of each chunk, by completion."""
        found: list[dict[int, float]] = []
        assert self.after.token_scores is not None
        for row in self.after.token_scores:
            found.append({})
            end = 0
            for at, score in enumerate(row):
                if not math.isnan(score):
                    if at >= end:
                        found[-1][at], end = score, at + self.objective.chunk_tokens
                    assert score == row[end - self.objective.chunk_tokens], "one score in a chunk"
        return found

    @property
    def metrics(self) -> dict[str, float]:
        taken = self.objective.take_metrics()
        return {m.name: m.sum if m.count is None else m.sum / m.count for m in taken}


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return load_miniature("base")


@pytest.fixture(scope="module")
def writer() -> LocalTeacher:
    return LocalTeacher(FrozenModel(load_miniature("teacher")), context=256)


@pytest.fixture
def audit(student, writer):
    """What an OmniOPD with few short chunks makes of TEXTS. Without a baseline: scores are targets."""

    def run(
        *, lose: frozenset[int] = frozenset(), stopped: bool = False, row: int | None = None, **changes: Any
    ) -> Audit:
        prompts = []
        for number, problem in enumerate(("12+34-5", "1+2+3", "8-1-1", "7+5-9")):
            turns = (Message(role="user", content=problem),)
            ids = render(student.tokenizer, turns)
            prompts.append(
                Prompt(
                    row=number if row is None else row, messages=turns, token_ids=ids,
                    teacher_messages=turns, teacher_token_ids=ids,
                )
            )  # fmt: skip
        objective = OmniOPD.model_validate({"baseline": "none"} | FEW | changes).bind(
            ModelFacts.read(str(MODELS / "base"))
        )
        ids = tuple(encode(student.tokenizer, text) for text in TEXTS)
        before = Rollouts(prompts=tuple(prompts), completion_ids=ids, finished=(False,) * 4)
        teacher = Recording(writer, lose, stopped)
        context = StepContext(
            student=FrozenModel(student), teacher=teacher, ranks=Ranks(Accelerator()), micro_batch_tokens=128
        )
        after = objective.annotate(before, context)
        return Audit(objective=objective, student=student, teacher=teacher, before=before, after=after)

    return run


def test_the_teacher_is_asked_for_what_comes_before_a_chunk_and_never_sees_it(audit):
    done = audit(teacher_temperature=0.7)
    for i, (chain, chunks) in enumerate(zip(done.teacher.asked, done.chunks, strict=True)):
        prefixes = [decode(done.student.tokenizer, done.before.completion_ids[i][:start]) for start in chunks]
        assert [request.prefix for request in chain] == prefixes  # nested, rising
        assert all(request.messages == done.before.prompts[i].teacher_messages for request in chain)
        assert all((r.samples, r.max_new_tokens, r.temperature) == (4, 5, 0.7) for r in chain)
    assert [len(chunks) for chunks in done.chunks] == [3, 0, 0, 2]


def test_targets_are_similarity_and_the_students_own_probability(audit):
    done = audit(prior=2.0)
    prompt, ids = done.before.prompts[0].token_ids, done.before.completion_ids[0]
    with torch.no_grad():
        out = done.student.model.eval()(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    logprobs = out.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    order = torch.distributions.Categorical(logits=out).entropy().argsort(descending=True).tolist()
    assert tuple(done.chunks[0]) == place_chunks(order, len(ids), chunk_tokens=5, most=3)
    written = done.teacher.inner.generate(done.teacher.asked)[0]  # the same requests, the same answers
    for (start, score), continuation in zip(done.chunks[0].items(), written, strict=True):
        chunk = decode(done.student.tokenizer, ids[start : start + 5])
        own = math.exp(float(logprobs[start : start + 5].mean()))
        expected = (sum(edit_similarity(chunk, continuation.texts)) + 2 * own) / 6
        assert score == pytest.approx(expected, abs=1e-4)


def test_the_baseline_is_subtracted_from_every_target_of_the_step(audit):
    targets = audit().chunks
    mean = sum(x for row in targets for x in row.values()) / 5
    less_mean = audit(baseline="batch_mean").chunks
    # one prompt with two audited completions: each against the other's mean
    less_other = audit(baseline="leave_one_out", row=0).chunks
    for i, other in ((0, 3), (3, 0)):
        others = sum(targets[other].values()) / len(targets[other])
        for start, target in targets[i].items():
            assert less_mean[i][start] == pytest.approx(target - mean)
            assert less_other[i][start] == pytest.approx(target - others)


def test_a_lost_answer_drops_its_chunk_alone_and_is_counted(audit):
    whole, some = audit(), audit(lose=frozenset({1}))
    first = list(whole.chunks[0].items())
    assert list(some.chunks[0].items()) == [first[0], first[2]]
    assert some.chunks[3] == whole.chunks[3]
    metrics = some.metrics
    assert metrics["omni/dropped_chunks/sum"] == 1
    assert metrics["omni/audited/share"] == pytest.approx(20 / sum(some.after.lengths))
    targets = [score for row in some.chunks for score in row.values()]
    assert metrics["omni/target/mean"] == pytest.approx(sum(targets) / 4)


def test_a_teacher_that_stops_stops_the_run_with_its_reason(audit):
    with pytest.raises(ServerError, match="the budget is spent"):
        audit(stopped=True)


def test_with_the_first_tokens_alone_no_chunk_reaches_beyond(audit):
    done = audit(tokens={"first": 11})
    assert max(done.before.lengths) > 16
    starts = [start for row in done.chunks for start in row]
    assert starts
    assert max(starts) <= 11 - 5
    assert len(starts) == sum(map(len, done.teacher.asked))


def test_a_cut_completion_is_audited_within_what_was_sampled_and_anchored_as_the_whole(tmp_path, train_file):
    method = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, objective=OMNI))).method
    with torch.no_grad():
        for weight in method.student.lm.model.parameters():
            weight.mul_(1.05)  # away from the start, or the anchor is zero
    whole = encode(method.student.lm.tokenizer, TEXTS[0])
    prompts = method_prompts(method.student.lm, 2)
    rollouts = Rollouts(prompts=prompts, completion_ids=(whole[:20], whole[:9]), finished=(False, False))
    rollouts = method.annotate(rollouts)
    audited = [[not math.isnan(score) for score in row] for row in rollouts.token_scores]
    assert all(sum(row) in (5, 10, 15) for row in audited)  # whole chunks
    (values,) = method.student.losses(method.batch(rollouts), method.targets(rollouts))
    assert len(values) == 29  # no end-of-text
    both = ~torch.tensor(audited[0][:9]) & ~torch.tensor(audited[1])
    assert int(both.sum()) > 0
    assert float(values[:9][both].detach().min()) > 0
    assert_close(values[:9][both], values[20:][both], atol=1e-5, rtol=1e-4)


def test_the_anchor_is_the_initial_student_however_far_it_has_moved(tmp_path, train_file):
    method = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, objective=OMNI))).method
    ids = tuple(encode(method.student.lm.tokenizer, text) for text in TEXTS[:2])
    rollouts = Rollouts(prompts=method_prompts(method.student.lm, 2), completion_ids=ids, finished=(True, True))
    nothing = replace(rollouts, token_scores=tuple((math.nan,) * n for n in rollouts.lengths))

    def anchor() -> tuple[Targets, float]:
        targets = method.targets(nothing)
        return targets, float(method.student.evaluate(method.batch(nothing), targets)[0].mean())

    at_start, loss_at_start = anchor()
    assert loss_at_start == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for parameter in method.student.lm.model.parameters():
            parameter.mul_(1.2)
    moved, loss = anchor()
    assert loss > 0.001
    for spec in method.student.taps.hidden:
        assert_close(at_start.reference.hidden[spec], moved.reference.hidden[spec])


def method_prompts(lm: LanguageModel, count: int) -> tuple[Prompt, ...]:
    turns = (Message(role="user", content="12+34-5"),)
    ids = render(lm.tokenizer, turns)
    return (Prompt(row=0, messages=turns, token_ids=ids, teacher_messages=turns, teacher_token_ids=ids),) * count


def test_a_run_learns_from_what_the_teacher_wrote_and_writes_the_audits_metrics(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, objective=OMNI, max_steps=1, prompts_per_step=2)
    run_recipe(parse_recipe(tree))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < row["omni/similarity/mean"] < 1
    assert row["train/grad_norm/mean"] > 0
