"""Against vLLM itself: the same targets as a local teacher with the same weights, and text in every way it is asked for."""

import pytest
import torch
from torch.testing import assert_close

from conftest import miniature_recipe
from oprd.errors import ServerError
from oprd.recipe import parse_recipe
from oprd.teacher.base import GenerationRequest
from oprd.teacher.server import ServerTeacherConfig
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import ALL_TOKENS, HiddenSpec, Message, Taps
from serving import TEACHER, connect, given_rollouts, metrics, served, vllm_serve

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SLOW = {"timeout_s": 120.0}  # the first log-probabilities take vLLM 20 s on one core


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with vllm_serve(TEACHER, tmp_path_factory.mktemp("vllm") / "log.txt") as url:
        yield url


def test_served_and_local_targets_agree_to_a_thousandth(url, tmp_path, train_file):
    config = ServerTeacherConfig(**served(url) | SLOW)
    teacher = connect(config, tmp_path / "run", logprobs=True, top_k=16)
    local = setup(parse_recipe(miniature_recipe(tmp_path / "local", train_file, objective={"type": "opd"}))).method
    rollouts = given_rollouts(local.student.lm.tokenizer)
    served_targets = teacher.targets(teacher.annotate(rollouts), Taps()).logprobs
    spec = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
    tapped = local.teacher.targets(rollouts, Taps(hidden=(spec,), head=True)).teacher
    log_q = (tapped.hidden[spec] @ tapped.head.weight.T).log_softmax(-1)
    ids = torch.tensor([i for row in rollouts.completion_ids for i in row])
    assert_close(served_targets.sampled, log_q.gather(-1, ids[:, None])[:, 0], atol=1e-3, rtol=0)
    assert_close(served_targets.top_logprobs, log_q.topk(16).values, atol=1e-3, rtol=0)


def test_more_log_probabilities_than_the_server_gives_are_refused_at_start(url, tmp_path, train_file):
    objective = {"type": "opd_top_k", "k": 21, "support": "teacher"}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(url) | SLOW, objective=objective)
    with pytest.raises(ServerError, match="greater than max allowed: 20"):
        setup(parse_recipe(tree))


@pytest.mark.parametrize("continuation", ["completions", "continue_final_message"])
def test_a_completion_that_was_begun_is_continued(continuation, url, tmp_path):
    config = ServerTeacherConfig(**served(url, continuation=continuation) | SLOW)
    teacher = connect(config, tmp_path, text=True, continues=True)
    question = GenerationRequest(
        messages=(Message(role="user", content="12+34-5"),),
        prefix="12+34=46\n4",
        samples=3,
        max_new_tokens=30,
        temperature=0.01,
    )
    (generation,) = teacher.generate([[question]])[0]
    assert generation.texts == ("6-5=41\n\\boxed{41}",) * 3
    assert teacher.metrics()[0].sum == 1


def test_omni_learns_from_vllm(url, tmp_path, train_file):
    objective = {"type": "omni_opd", "chunk_tokens": 6, "chunks": 2, "continuations": 5}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(url) | SLOW, objective=objective, max_steps=2)
    run_recipe(parse_recipe(tree))
    for row in metrics(tmp_path / "run"):
        assert row["omni/dropped_chunks/sum"] == 0
        assert 0 < row["omni/similarity/mean"] <= 1
