"""Teachers behind a server, on whole steps and runs: what they ask, what comes of it, what happens when they give out."""

import json
import logging
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml
from torch.testing import assert_close

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.errors import ConfigError, RunFolderError, ServerError, TeacherMismatch, TrainingStopped
from oprd.recipe import parse_recipe
from oprd.report.html import write_report
from oprd.teacher.base import GenerationRequest
from oprd.teacher.server import ServerTeacherConfig
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import Capability, HiddenSpec, Message, Taps, TokenSelection
from serving import (
    TEACHER,
    Body,
    FaultyServer,
    connect,
    given_rollouts,
    metrics,
    served,
    teacher_context,
    transformers_serve,
)

pytestmark = pytest.mark.slow

OMNI = {"type": "omni_opd", "chunk_tokens": 6, "chunks": 2, "continuations": 3, "anchor": 0.1}
SAMPLED = {"type": "opd_sampled"}
LENGTHS = {"group_size": 2, "max_completion_length": 48}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`transformers serve` with the miniature teacher."""
    with transformers_serve(TEACHER, tmp_path_factory.mktemp("serve") / "log.txt") as url:
        yield url


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


def real_teacher(url: str, **changes) -> dict[str, object]:
    return served(url, model=str(TEACHER), many_samples=False, concurrency=4, timeout_s=120.0) | changes


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


# Text, from transformers serve


def test_a_real_server_continues_a_completion_that_was_begun(real, tmp_path):
    config = ServerTeacherConfig(**real_teacher(real))
    teacher = connect(config, tmp_path, text=True)
    question = GenerationRequest(
        messages=(Message(role="user", content="12+34-5"),),
        prefix="12+34=46\n4",
        samples=2,
        max_new_tokens=30,
        temperature=0.0,
    )
    (generation,) = teacher.generate([[question]])[0]
    assert generation.texts == ("6-5=41\n\\boxed{41}",) * 2
    assert generation.finished == (True, True)
    assert teacher.metrics()[0].sum == 2


def test_a_real_server_whose_chat_begins_anew_is_found_out_before_anything_is_loaded(real, tmp_path):
    """transformers serve ends the assistant's message and starts another: neither form of prefill continues there."""
    config = ServerTeacherConfig(**real_teacher(real, continuation="prefill", tokenizer=None))
    with pytest.raises(ServerError, match=r"begins anew .* continuation='prefill'. Use another one: completions"):
        connect(config, tmp_path, prompt="12+34-5+9-70", text=True, continues=True)


def test_omni_learns_from_a_real_server_and_a_repeated_run_pays_nothing(real, tmp_path, train_file):
    teacher = real_teacher(real, cache=str(tmp_path / "cache.sqlite"))
    tree = miniature_recipe(
        tmp_path / "one", train_file, teacher=teacher, objective=OMNI, max_steps=2, prompts_per_step=2
    )
    run_recipe(parse_recipe(tree))
    rows = metrics(tmp_path / "one")
    for row in rows:
        assert row["teacher/requests/sum"] > 0
        assert 0 < row["omni/audited/share"] < 1
        assert 0 < row["omni/similarity/mean"] <= 1
        assert 0 < row["omni/target/mean"] < 1
        assert row["omni/dropped_chunks/sum"] == 0
        assert row["omni/teacher_tokens/mean"] > 0
        assert row["health/student_entropy/mean"] > 0
        assert "health/teacher_entropy/mean" not in row  # a server shows no states
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "two")}))
    again = metrics(tmp_path / "two")
    assert sum(row["teacher/requests/sum"] for row in again) == 0
    assert [row["train/loss/mean"] for row in again] == [row["train/loss/mean"] for row in rows]


@pytest.mark.parametrize("source", ["rewrite", "teacher"])
def test_rewriting_and_sequence_distillation_learn_from_a_real_server(source, real, tmp_path, train_file):
    options = {"objective": {"type": "nll"}, "max_steps": 1, "prompts_per_step": 2}
    rollout = LENGTHS | {"source": {"type": source}}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=real_teacher(real), rollout=rollout, **options)
    run_recipe(parse_recipe(tree))
    (row,) = metrics(tmp_path / "run")
    assert row["teacher/requests/sum"] > 0
    if source == "teacher":
        assert row["sequence/length/mean"] > 10
        assert row["train/nll/mean"] > 0


# Log-probabilities


def test_a_served_teacher_gives_the_targets_of_a_local_one_with_the_same_weights(server, tmp_path, train_file):
    objective = [SAMPLED, {"type": "opd_top_k", "k": 4, "support": "teacher"}]
    config = ServerTeacherConfig(**served(server.url))
    teacher = connect(config, tmp_path / "run", logprobs=True, top_k=4)
    local = setup(parse_recipe(miniature_recipe(tmp_path / "local", train_file, objective=objective)))
    rollouts = given_rollouts(local.method.student.lm.tokenizer)
    annotated = teacher.annotate(rollouts)
    assert annotated.token_weights == tuple((1.0,) * length for length in rollouts.lengths)
    given = teacher.targets(annotated, Taps()).logprobs
    spec = HiddenSpec(block="last", at="predicting", tokens=TokenSelection())
    states = local.method.teacher.targets(rollouts, Taps(hidden=(spec,), head=True)).teacher
    log_q = (states.hidden[spec] @ states.head.weight.T).log_softmax(-1)
    ids = torch.tensor([i for row in rollouts.completion_ids for i in row])
    assert_close(given.sampled, log_q.gather(-1, ids[:, None])[:, 0], atol=1e-3, rtol=0)
    assert_close(given.top_logprobs, log_q.topk(4).values, atol=1e-3, rtol=0)
    assert torch.equal(given.top_ids, log_q.topk(4).indices)


def test_what_was_lost_has_weight_0_and_what_had_it_before_keeps_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr("oprd.teacher.transport.MAX_LOST_SHARE", 0.5)
    teacher = connect(ServerTeacherConfig(**served(server.url, concurrency=1)), tmp_path, logprobs=True, top_k=2)
    server.fault = lambda number: "400" if number == 3 else None  # the first is the check at start
    rollouts = given_rollouts(load_miniature("teacher").tokenizer)
    before = ((0.0, *(0.5,) * (rollouts.lengths[0] - 1)), (), (1.0,) * rollouts.lengths[2])
    annotated = teacher.annotate(replace(rollouts, token_weights=before))
    assert annotated.token_weights == (before[0], (), (0.0,) * rollouts.lengths[2])
    assert [targets.top_ids.shape for targets in annotated.logprobs] == [(n, 2) for n in rollouts.lengths]
    assert annotated.logprobs[0].sampled.abs().sum() > 0
    assert annotated.logprobs[2].sampled.abs().sum() == 0


def test_a_teacher_that_finds_the_completions_less_probable_than_chance_is_refused(server, tmp_path):
    teacher = connect(ServerTeacherConfig(**served(server.url)), tmp_path, logprobs=True)
    rollouts = given_rollouts(load_miniature("teacher").tokenizer)
    noise = tuple(tuple((7 * i) % 250 + 5 for i in range(40)) for _ in rollouts.prompts)
    with pytest.raises(
        ServerError, match=r"mean log-probability of -\d+.\d+ nats a token; random tokens would have -5.5"
    ):
        teacher.annotate(replace(rollouts, completion_ids=noise))


def altered(server, change) -> None:
    """Let `change` edit the log-probabilities of the last token of every prompt that is longer than the check at start."""
    inner = server.reply

    def reply(path, body):
        answer = inner(path, body)
        rows = answer["choices"][0]["prompt_logprobs"]
        change(rows[-1], str(body["prompt"][-1]))
        return answer

    server.reply = reply


@pytest.mark.parametrize("value", [-9999.0, -math.inf])
def test_a_token_that_a_server_calls_impossible_has_weight_0(value, server, tmp_path):
    teacher = connect(ServerTeacherConfig(**served(server.url)), tmp_path, logprobs=True, top_k=2)
    altered(server, lambda row, token: row[token].update(logprob=value))
    rollouts = given_rollouts(load_miniature("teacher").tokenizer)
    annotated = teacher.annotate(rollouts)
    assert annotated.token_weights == tuple((1.0,) * (n - 1) + (0.0,) if n else () for n in rollouts.lengths)
    joined = teacher.targets(annotated, Taps()).logprobs
    assert float(joined.sampled.min()) > -100
    assert float(joined.top_logprobs.min()) > -100
    counts = {metric.name: metric.sum for metric in teacher.metrics()}
    assert counts["teacher/impossible_tokens/sum"] == sum(n > 0 for n in rollouts.lengths)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row, token: row[token].update(logprob=math.nan), "are not numbers or are above 0"),
        (lambda row, token: row[token].update(logprob=0.5), "are not numbers or are above 0"),
        (
            lambda row, token: row.update({"100000": {"logprob": -1.0}}),
            "gives token id 100000; .* vocabulary ends at 261",
        ),
    ],
)
def test_log_probabilities_that_cannot_be_are_refused_before_they_are_learned_from(change, reason, server, tmp_path):
    teacher = connect(ServerTeacherConfig(**served(server.url)), tmp_path, logprobs=True)
    altered(server, change)
    with pytest.raises(ServerError, match=reason):
        teacher.annotate(given_rollouts(load_miniature("teacher").tokenizer))


def test_without_a_tokenizer_or_with_another_one_a_server_provides_text_alone(tmp_path):
    by_token = {Capability.LOGPROBS, Capability.TOP_K, Capability.SAME_TOKENIZER}

    def facts(**changes):
        config = ServerTeacherConfig(**served("http://host/v1", **changes))
        return config.facts(teacher_context(tmp_path))

    assert facts().provides == {Capability.TEXT, *by_token}
    without = facts(tokenizer=None, continuation="prefill")
    assert without.provides == {Capability.TEXT}
    assert set(without.why_not) == by_token
    assert "give `tokenizer`" in without.why_not[Capability.LOGPROBS]
    other = facts(tokenizer=str(MODELS / "wide_teacher"))
    assert other.provides == {Capability.TEXT}
    assert "another vocabulary" in other.why_not[Capability.TOP_K]


def test_sampled_opd_from_a_server_makes_the_update_of_a_local_teacher(server, tmp_path, train_file):
    options = {"objective": SAMPLED, "max_steps": 2, "health_tokens": 0}
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "served", train_file, teacher=served(server.url), **options)))
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "local", train_file, **options)))
    ours, theirs = (metrics(tmp_path / name) for name in ("served", "local"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["train/loss/mean"] == pytest.approx(b["train/loss/mean"], abs=1e-3)
        assert a["train/grad_norm/mean"] == pytest.approx(b["train/grad_norm/mean"], rel=1e-2)


def test_completions_whose_log_probabilities_were_lost_are_left_out_and_counted(
    server, tmp_path, train_file, monkeypatch
):
    options = {"objective": SAMPLED, "max_steps": 1, "health_tokens": 0}
    monkeypatch.setattr("oprd.teacher.transport.MAX_LOST_SHARE", 0.5)
    teacher = served(server.url, max_retries=0)
    server.fault = lambda number: "500" if number in {3, 6} else None  # the first is the check at start
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "run", train_file, teacher=teacher, **options)))
    (row,) = metrics(tmp_path / "run")
    assert row["teacher/lost/sum"] == 2
    assert row["train/reverse_kl/mean"] > 0


def test_a_server_with_other_tokens_or_without_log_probabilities_is_refused_at_start(
    server, real, tmp_path, train_file
):
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(server.url), objective=SAMPLED)
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"prompt": [min(i + 1, 261) for i in body["prompt"]]})
    with pytest.raises(ServerError, match=r"answers for other token ids than were sent .* has another tokenizer"):
        setup(parse_recipe(tree))
    with pytest.raises(ServerError, match="HTTP 4"):
        setup(parse_recipe(tree | {"teacher": real_teacher(real)}))


# What fits what


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"type": "opd"}, "objective 'opd' needs next-token distributions.*teacher 'server' .* provides .*text"),
        ({"type": "oprd"}, "objective 'oprd' needs hidden states"),
        ({"type": "nll"}, "needs completions written by the teacher.*Set rollout.source to 'teacher', 'rewrite'"),
    ],
)
def test_an_objective_that_the_server_cannot_serve_is_refused(objective, message, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "r", train_file, teacher=served("http://127.0.0.1:9/v1"), objective=objective)
    with pytest.raises(TeacherMismatch, match=message):
        setup(parse_recipe(tree))


def test_fields_that_make_no_sense_together_are_refused_by_the_recipe(tmp_path, train_file):
    def refused(message, **changes):
        teacher = served("http://host/v1") | changes
        with pytest.raises(ConfigError, match=message) as caught:
            parse_recipe(miniature_recipe(tmp_path, train_file, teacher=teacher))
        assert "secret" not in str(caught.value)

    refused("without a password", base_url="http://me:secret@host/v1")
    refused("must be the name of an environment variable", api_key_env="sk-secret")
    refused("give `tokenizer`", tokenizer=None)
    refused("max_cost needs price_per_million", max_cost=1.0)
    refused("max_cost needs price_per_million", max_cost=1.0, price_per_million=[0.0, 0.0])
    refused(r"must be two prices: \[prompt, completion\]", price_per_million=[1.0])


# Faults, in whole runs


def omni_run(folder, train_file, url, **changes):
    teacher = served(url, cache=None) | changes.pop("teacher", {})
    options = {"objective": OMNI, "max_steps": 3, "prompts_per_step": 2, "save_steps": 100, "health_tokens": 0}
    return miniature_recipe(folder, train_file, teacher=teacher, **options | changes)


def test_a_refused_connection_is_said_before_anything_is_loaded(tmp_path, train_file, monkeypatch):
    monkeypatch.setattr("oprd.train.setup.load_student", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ServerError, match=r"no connection. Is it running, is base_url right"):
        setup(parse_recipe(omni_run(tmp_path / "run", train_file, FaultyServer().url, teacher={"max_retries": 0})))


def test_a_server_that_ignores_n_is_found_out_at_start(server, tmp_path, train_file):
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"n": 1})
    with pytest.raises(ServerError, match="set many_samples: false"):
        setup(parse_recipe(omni_run(tmp_path / "run", train_file, server.url)))


@pytest.mark.parametrize("source", ["rewrite", "teacher"])
def test_a_server_without_n_that_continues_nothing_is_good_enough_where_whole_texts_are_asked_for(
    source, server, tmp_path, train_file
):
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"n": 1})
    teacher = served(server.url, continuation="prefill", tokenizer=None)  # this server begins anew
    rollout = LENGTHS | {"source": {"type": source}}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, rollout=rollout, objective={"type": "nll"})
    setup(parse_recipe(tree))
    assert server.requests == 1


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_check_at_start_that_fails_says_what_the_server_said(bad, server, tmp_path, train_file):
    server.fault = lambda number: "400" if number == bad else None
    with pytest.raises(ServerError, match=r"HTTP 400: .*too long for me") as caught:
        setup(parse_recipe(omni_run(tmp_path / "run", train_file, server.url)))
    assert "many_samples" not in str(caught.value)


def test_a_server_without_log_probabilities_is_refused_with_its_own_words(server, tmp_path, train_file):
    server.fault = lambda number: "400"
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(server.url), objective=SAMPLED)
    with pytest.raises(
        ServerError, match=r"HTTP 400: .*too long for me.*It was asked for `prompt_logprobs`. If it refuses that"
    ):
        setup(parse_recipe(tree))


def test_a_server_that_was_changed_is_checked_again_on_resume(server, tmp_path, train_file):
    tree = omni_run(tmp_path / "run", train_file, server.url, save_steps=1, max_steps=2)
    run_recipe(parse_recipe(tree))
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"n": 1})
    with pytest.raises(ServerError, match="set many_samples: false"):
        setup(parse_recipe(tree | {"resume_from_checkpoint": "latest"}))


def test_a_run_folder_that_was_moved_keeps_its_account(server, tmp_path, train_file):
    teacher = {"max_requests": 3}
    setup(parse_recipe(omni_run(tmp_path / "one", train_file, server.url, teacher=teacher)))
    assert server.requests == 3
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(ServerError, match="could pass max_requests=3"):
        setup(parse_recipe(omni_run(tmp_path / "two", train_file, server.url, teacher=teacher)))


def test_a_run_goes_on_without_the_chunks_it_lost(server, tmp_path, train_file, monkeypatch):
    monkeypatch.setattr("oprd.teacher.transport.MAX_LOST_SHARE", 0.5)
    server.fault = lambda number: "empty" if number in {8, 9, 10} else None
    teacher = {"max_retries": 2, "concurrency": 1}
    run_recipe(parse_recipe(omni_run(tmp_path / "run", train_file, server.url, teacher=teacher)))
    rows = metrics(tmp_path / "run")
    assert sum(row["omni/dropped_chunks/sum"] for row in rows) == 1
    assert len(rows) == 3


@pytest.mark.parametrize("end", ["death", "budget"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights_and_pays_nothing_twice(end, server, tmp_path, train_file):
    whole = omni_run(tmp_path / "whole", train_file, server.url)
    run_recipe(parse_recipe(whole))
    asked = Counter(server.generated)
    checks = Counter(server.generated[:3])
    server.generated.clear()
    # in the middle of the second step
    limit = 3 + len(asked) // 2
    start, server.requests = {}, 0
    if end == "death":
        server.fault = lambda number: "die" if number == limit else None
    else:
        start = {"max_requests": limit}
    tree = omni_run(tmp_path / "cut", train_file, server.url, teacher={"concurrency": 1, "max_retries": 1} | start)
    message = "no connection" if end == "death" else f"could pass max_requests={limit}"
    with pytest.raises(TrainingStopped, match=f"{message}.*Stopped before step 2; a checkpoint is in .*latest"):
        run_recipe(parse_recipe(tree))
    assert server.requests == limit
    server.fault = lambda number: None
    if end == "death":
        server.start()
    tree["teacher"] |= {"max_requests": 1000}
    run_recipe(parse_recipe(tree | {"resume_from_checkpoint": "latest"}))
    assert Counter(server.generated) == asked + checks  # which every start asks anew
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2, 3]


def test_no_file_line_or_error_of_a_run_with_failures_holds_the_key(
    server, tmp_path, train_file, monkeypatch, capfd, caplog
):
    """The server repeats the key in whatever it answers wrongly: errors, reasons, headers, addresses."""
    secret = "sk-very-secret-0123456789"
    for name in ("oprd", "openai", "httpx2"):  # httpcore2 tells every header of an answer, if someone asks for it
        caplog.set_level(logging.DEBUG, name)
    monkeypatch.setenv("TEST_KEY", secret)
    monkeypatch.setattr("oprd.teacher.transport.MAX_LOST_SHARE", 0.9)
    said = json.dumps({"error": secret}).encode()
    wrong = {
        5: Body(said, {"Retry-After": "0", "X-Key": secret}, 500),
        6: Body(said, {}, 400),
        7: Body(said),
        8: f"ends: {json.dumps(secret)}",
    }
    server.fault = lambda number: "401" if number == 12 else wrong.get(number)
    tree = omni_run(tmp_path / "run", train_file, server.url, teacher={"api_key_env": "TEST_KEY", "concurrency": 1})
    with pytest.raises(TrainingStopped, match=r"HTTP 401: .*\[key\]") as caught:
        run_recipe(parse_recipe(tree))
    chain = [str(error) + repr(error) for error in (caught.value, caught.value.__cause__, caught.value.__context__)]
    server.fault = lambda number: Body(b"", {"Location": f"{server.url}?{secret}"}, 307) if number == 16 else None
    tree["resume_from_checkpoint"] = "latest"
    with pytest.raises(TrainingStopped, match="HTTP 307") as caught:
        run_recipe(parse_recipe(tree))
    chain += [str(error) + repr(error) for error in (caught.value, caught.value.__cause__, caught.value.__context__)]
    run_recipe(parse_recipe(tree))
    write_report([tmp_path / "run"], tmp_path / "run" / "report.html")
    assert set(server.headers) == {f"Bearer {secret}"}
    files = {str(file.relative_to(tmp_path / "run")): file for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert {"teacher_cache.sqlite", "student/README.md", "report.html", "recipe.yaml"} <= set(files)
    assert not [name for name, file in files.items() if secret.encode() in file.read_bytes()]
    assert secret not in "".join([*capfd.readouterr(), *chain, caplog.text])
    assert "openai" in caplog.text  # it was listened to


def test_what_the_cache_may_grow_to_is_part_of_the_room_that_a_run_needs(tmp_path, train_file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 2**30))
    objective = {"type": "opd_top_k", "k": 20, "support": "teacher"}
    options = {"objective": objective, "max_steps": 10_000, "prompts_per_step": 64, "save_total_limit": 1}
    tree = miniature_recipe(
        tmp_path / "run", train_file, teacher=served("http://127.0.0.1:9/v1", max_retries=0), **options
    )
    # 10,000 steps of 64 x 2 completions of 48 tokens with 21 numbers of 10 bytes each
    with pytest.raises(RunFolderError, match=r"has 1.0 GiB free; .*the teacher's cache need about 12.0 GiB"):
        setup(parse_recipe(tree))
    elsewhere = tree["teacher"] | {"cache": str(tmp_path / "cache.sqlite")}
    with pytest.raises(ServerError, match="no connection"):
        setup(parse_recipe(tree | {"teacher": elsewhere}))


def test_what_was_under_way_when_a_run_was_killed_is_paid_from_its_budget(server, tmp_path, train_file):
    teacher = served(server.url, max_requests=13)
    options = {"objective": SAMPLED, "prompts_per_step": 2, "max_steps": 2, "health_tokens": 0, "save_steps": 100}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, **options)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    server.fault = lambda number: "hang" if number > 5 else None  # a check at start, and four requests a step
    with (tmp_path / "log.txt").open("w") as log:
        run = subprocess.Popen([sys.executable, "-m", "oprd", "train", str(tmp_path / "recipe.yaml")], stderr=log)
    while server.requests < 9:
        assert run.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    run.kill()
    run.wait()
    with sqlite3.connect(tmp_path / "run" / "teacher_cache.sqlite") as database:
        booked = database.execute("SELECT requests, prompt, completion FROM usage").fetchone()
    sent = [json.loads(body)["prompt"] for body in server.generated]
    assert booked[0] == 9
    assert booked[1] > sum(map(len, sent))  # of five; those of the other four were not answered
    assert booked[2] == 9
    server.fault = lambda number: None
    tree["resume_from_checkpoint"] = "latest"
    with pytest.raises(TrainingStopped, match="could pass max_requests=13"):  # a check, the cache, and three of four
        run_recipe(parse_recipe(tree))
    assert server.requests == 13
    tree["teacher"] = teacher | {"max_requests": 15}
    run_recipe(parse_recipe(tree))
    assert server.requests == 15
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_omni_combines_with_another_term_lora_and_several_teachers(server, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"problem": f"{i}1+2-{i}", "teacher": name} for i, name in enumerate(["near", "far"] * 2, start=1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {
        "near": {"type": "local", "model": str(TEACHER), "dtype": "float32"},
        "far": served(server.url),
    }
    tree = miniature_recipe(
        tmp_path / "run",
        data,
        teacher={"type": "several", "teachers": teachers},
        objective=[OMNI, SAMPLED],
        max_steps=2,
    )
    tree["student"] |= {"lora": {"r": 4}}
    run_recipe(parse_recipe(tree))
    for row in metrics(tmp_path / "run"):
        assert row["teacher_far/requests/sum"] > 0
        assert row["train/omni_opd/mean"] != 0
        assert row["train/reverse_kl/mean"] > 0


def test_a_server_that_continues_and_scores_is_reported_with_all_that_it_was_asked(server, tmp_path, train_file):
    tree = omni_run(tmp_path / "run", train_file, server.url, objective=[OMNI, SAMPLED], max_steps=2)
    run_recipe(parse_recipe(tree))
    rows = metrics(tmp_path / "run")
    checks = 1 + 3
    assert sum(row["teacher/requests/sum"] for row in rows) == server.requests - checks


def test_two_teachers_that_rewrite_are_reported_together(server, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"problem": f"{i}1+2-{i}", "teacher": name} for i, name in enumerate(["near", "far"] * 2, start=1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {name: served(server.url) for name in ("near", "far")}
    tree = miniature_recipe(
        tmp_path / "run",
        data,
        teacher={"type": "several", "teachers": teachers},
        objective={"type": "nll"},
        rollout=LENGTHS | {"source": {"type": "rewrite"}},
        max_steps=1,
        prompts_per_step=4,
    )
    run_recipe(parse_recipe(tree))
    (row,) = metrics(tmp_path / "run")
    asked = row["teacher_near/requests/sum"] + row["teacher_far/requests/sum"]
    assert row["teacher_near/requests/sum"] == row["teacher_far/requests/sum"]
    rejected = sum(value for name, value in row.items() if name.startswith("rewrite/") and name.endswith("/sum"))
    assert rejected + row["rewrite/kept/share"] * asked == asked == server.requests - 2
    assert "rollout/accuracy/share" not in row  # no prompt has an answer
    assert "teacher_near/restarted/share" not in row  # nothing was continued


def test_a_local_teacher_of_another_tokenizer_can_be_asked_for_text(tmp_path, train_file):
    lm = load_miniature("teacher")
    lm.tokenizer.add_tokens(["<|other|>"])
    lm.model.resize_token_embeddings(300)
    lm.model.save_pretrained(tmp_path / "other")
    lm.tokenizer.save_pretrained(tmp_path / "other")
    teacher = {"type": "local", "model": str(tmp_path / "other"), "dtype": "float32"}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, objective=OMNI, max_steps=1)
    run_recipe(parse_recipe(tree))
    (row,) = metrics(tmp_path / "run")
    assert row["omni/similarity/mean"] > 0


def test_smollm2_behind_a_server_teaches_three_steps_on_real_problems(smollm2, dapo, tmp_path):
    """Its own weights teach it: OmniOPD, then MPD by likelihood, from text alone."""
    # ten tokens are no answer to a real problem, and what has no answer is not rewritten
    easy = tmp_path / "easy.jsonl"
    sums = [{"problem": f"What is {i} + 2? Be brief.", "answer": str(i + 2)} for i in range(8)]
    easy.write_text("".join(json.dumps(row) + "\n" for row in sums))
    with transformers_serve(smollm2, tmp_path / "log.txt") as url:
        teacher = served(url, model=str(smollm2), tokenizer=str(smollm2), many_samples=False, timeout_s=300.0)
        omni = OMNI | {"chunk_tokens": 4, "chunks": 1, "continuations": 2}
        for name, source, objective, prompts, length in (
            ("omni", "student", omni, dapo, 10),
            ("mpd", "rewrite", {"type": "nll"}, easy, 32),
        ):
            tree = {
                "student": {"model": str(smollm2), "lora": {"r": 8}},
                "teacher": teacher,
                "objective": objective,
                "data": {"prompts": str(prompts), "limit": 8},
                "rollout": {"group_size": 1, "max_completion_length": length, "source": {"type": source}},
                "prompts_per_step": 1 if name == "omni" else 4,
                "max_steps": 3,
                "learning_rate": 1e-4,
                "health_tokens": 0,
                "output_dir": str(tmp_path / name),
            }
            run_recipe(parse_recipe(tree))
            rows = metrics(tmp_path / name)
            assert len(rows) == 3
            asked = [row["teacher/requests/sum"] for row in rows]
            assert all(asked) if name == "omni" else sum(asked) >= 3
            assert all(row["teacher/lost/sum"] == 0 for row in rows)
    assert all(row["omni/audited/share"] > 0.3 for row in metrics(tmp_path / "omni"))


def test_processes_open_one_cache_at_the_same_moment(tmp_path):
    """In lockstep, by the clock: SQLite refuses a second process that makes the file a shared one, and does not wait."""
    code = (
        "import sys, time; from pathlib import Path; from oprd.teacher.exchange import UsageLog\n"
        "begin = float(input())\n"
        "for i in range(60):\n"
        "    time.sleep(max(0.0, begin + 0.03 * i - time.time()))\n"
        "    UsageLog(Path(sys.argv[1]) / str(i), ('', '', int(sys.argv[2]))).close()"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in started:
        process.stdin.write(f"{time.time() + 4}\n".encode())
        process.stdin.close()
    assert [process.wait() for process in started] == [0, 0]
    for process in started:
        process.stdout.close()
