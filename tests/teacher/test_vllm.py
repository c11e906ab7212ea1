"""Against vLLM itself: the same targets as a local teacher with the same weights, and text in every way it is asked for."""

import pytest
import torch
from torch.testing import assert_close

from conftest import load_miniature, miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.errors import ServerError
from oprd.teacher.client import Client
from oprd.teacher.server import ServerWriter
from oprd.teacher.writer import Ask
from oprd.train.build import build
from oprd.train.run import run_recipe
from oprd.types import Message, Reading, SampledTargets, TokenSelection, TopKTargets
from serving import TEACHER, given_rollouts, metrics, served, vllm_serve

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with vllm_serve(TEACHER, tmp_path_factory.mktemp("vllm") / "log.txt") as url:
        yield url


SLOW = {"request_timeout_s": 120.0}  # the first log-probabilities take vLLM 20 s on one core


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_served_and_local_targets_agree_to_a_thousandth(form, url, tmp_path, train_file):
    objective = {
        "type": "mixture",
        "terms": [
            {"type": "opd", "estimator": "sampled"},
            {"type": "opd", "estimator": "top_k", "top_k": 16, "support": "teacher"},
        ],
    }
    tree = miniature_recipe(
        tmp_path / "run", train_file, teacher=served(url, logprobs=form) | SLOW, objective=objective
    )
    run = build(parse_recipe(tree))
    local = build(parse_recipe(miniature_recipe(tmp_path / "local", train_file, objective=objective)))
    rollouts = given_rollouts(run.lm)
    targets = run.teacher.targets(run.teacher.prepare(rollouts), run.stage.distill.readings, head=True)
    sampled = next(part for part in targets.parts if isinstance(part, SampledTargets))
    top = next(part for part in targets.parts if isinstance(part, TopKTargets))
    reading = Reading(block=4, at="prediction", tokens=TokenSelection(keep="all"))
    hidden = local.teacher.targets(rollouts, [reading], head=True)
    log_q = (hidden.hidden[reading] @ hidden.head.weight.T).log_softmax(-1)
    ids = torch.tensor([i for row in rollouts.completion_ids for i in row])
    assert_close(sampled.logprobs, log_q.gather(-1, ids[:, None])[:, 0], atol=1e-3, rtol=0)
    assert_close(top.logprobs, log_q.topk(16).values, atol=1e-3, rtol=0)


def test_more_log_probabilities_than_the_server_gives_are_refused_at_start(url, tmp_path, train_file):
    objective = {"type": "opd", "estimator": "top_k", "top_k": 21, "support": "teacher"}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(url) | SLOW, objective=objective)
    with pytest.raises(ServerError, match="greater than max allowed: 20"):
        build(parse_recipe(tree))


@pytest.mark.parametrize("continuation", ["completions", "continue_final_message"])
def test_a_begun_answer_is_continued(continuation, url, tmp_path):
    config = parse_recipe(
        miniature_recipe(
            tmp_path, tmp_path, teacher=served(url, continuation=continuation) | SLOW, objective={"type": "omni_opd"}
        )
    ).teacher
    client = Client(config, cache=tmp_path / "c.sqlite", run="r")
    writer = ServerWriter(config, client, load_miniature("teacher").tokenizer)
    question = Ask(
        messages=(Message(role="user", content="12+34-5"),),
        prefix="12+34=46\n4",
        samples=3,
        max_tokens=30,
        temperature=0.01,
    )
    (written,) = writer.write([[question]])[0]
    assert written.texts == ("6-5=41\n\\boxed{41}",) * 3
    assert writer.tallies()[0].total == 1


def test_omni_learns_from_vllm(url, tmp_path, train_file):
    objective = {"type": "omni_opd", "chunk_tokens": 6, "chunks": 2, "continuations": 5}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(url) | SLOW, objective=objective, max_steps=2)
    run_recipe(parse_recipe(tree))
    for row in metrics(tmp_path / "run"):
        assert row["omni/dropped_chunks/sum"] == 0
        assert 0 < row["omni/similarity/mean"] <= 1
