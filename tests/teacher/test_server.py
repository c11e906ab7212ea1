"""Teachers behind a server, on whole steps and runs: what they ask, what comes of it, what happens when they give out."""

import json
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.errors import ConfigError, ServerError, TeacherMismatch, TrainingStopped
from oprd.teacher.client import Client
from oprd.teacher.server import ServerWriter
from oprd.teacher.writer import Ask
from oprd.train.build import build
from oprd.train.run import run_recipe
from oprd.types import (
    JointTargets,
    Message,
    Prompt,
    Reading,
    SampledTargets,
    TokenSelection,
    TopKTargets,
)
from serving import TEACHER, FaultyServer, given_rollouts, metrics, served, transformers_serve

OMNI = {"type": "omni_opd", "chunk_tokens": 6, "chunks": 2, "continuations": 3, "anchor": 0.1}
ALL = TokenSelection(keep="all")


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
    return served(url, model=str(TEACHER), many_samples=False, concurrency=4, request_timeout_s=60.0) | changes


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


# Text, from transformers serve


def test_a_real_server_continues_an_answer_that_was_begun(real, tmp_path):
    config = parse_recipe(miniature_recipe(tmp_path, tmp_path, teacher=real_teacher(real), objective=OMNI)).teacher
    writer = ServerWriter(
        config, Client(config, cache=tmp_path / "c.sqlite", run="r"), load_miniature("teacher").tokenizer
    )
    question = Ask(
        messages=(Message(role="user", content="12+34-5"),),
        prefix="12+34=46\n4",
        samples=2,
        max_tokens=30,
        temperature=0.0,
    )
    (written,) = writer.write([[question]])[0]
    assert written.texts == ("6-5=41\n\\boxed{41}",) * 2
    assert written.finished == (True, True)
    assert writer.tallies()[0].total == 2


def test_a_real_server_whose_chat_begins_anew_is_found_out_before_anything_is_loaded(real, tmp_path, train_file):
    """transformers serve ends the assistant's message and starts another: neither form of prefill continues there."""
    teacher = real_teacher(real, continuation="prefill")
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, objective=OMNI)
    config = parse_recipe(tree).teacher
    writer = ServerWriter(config, Client(config, cache=tmp_path / "c.sqlite", run="r"), None)
    prompt = Prompt(row=0, messages=(Message(role="user", content="12+34-5+9-70"),), token_ids=(1,))
    with pytest.raises(ServerError, match=r"begins anew .* continuation='prefill'. Use another one: completions"):
        writer.check(prompt, continues=True)


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
    assert rows[0]["omni/anchor_kl/mean"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["omni/anchor_kl/mean"] > 0
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "two")}))
    again = metrics(tmp_path / "two")
    assert sum(row["teacher/requests/sum"] for row in again) == 0
    assert [row["train/loss/mean"] for row in again] == [row["train/loss/mean"] for row in rows]


def test_rewriting_and_sequence_distillation_learn_from_a_real_server(real, tmp_path, train_file):
    for kind in ("rewrite", "sequence"):
        teacher = {"type": kind, "teacher": real_teacher(real)}
        options = {"objective": {"type": "nll"}, "max_steps": 1, "prompts_per_step": 2}
        run_recipe(parse_recipe(miniature_recipe(tmp_path / kind, train_file, teacher=teacher, **options)))
        (row,) = metrics(tmp_path / kind)
        assert row["teacher/requests/sum"] > 0
        if kind == "sequence":
            assert row["sequence/length/mean"] > 10
            assert row["train/nll/mean"] > 0


# Log-probabilities


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_a_served_teacher_gives_the_targets_of_a_local_one_with_the_same_weights(form, server, tmp_path, train_file):
    objective = {
        "type": "mixture",
        "terms": [
            {"type": "opd", "estimator": "sampled"},
            {"type": "opd", "estimator": "top_k", "top_k": 4, "support": "teacher"},
        ],
    }
    tree = miniature_recipe(
        tmp_path / "run", train_file, teacher=served(server.url, logprobs=form), objective=objective
    )
    run = build(parse_recipe(tree))
    local = build(parse_recipe(miniature_recipe(tmp_path / "local", train_file, objective=objective)))
    rollouts = given_rollouts(run.lm)
    targets = run.teacher.targets(run.teacher.prepare(rollouts), run.stage.distill.readings, head=True)
    assert isinstance(targets, JointTargets)
    sampled = next(part for part in targets.parts if isinstance(part, SampledTargets))
    top = next(part for part in targets.parts if isinstance(part, TopKTargets))
    reading = Reading(block=4, at="prediction", tokens=ALL)
    hidden = local.teacher.targets(rollouts, [reading], head=True)
    log_q = (hidden.hidden[reading] @ hidden.head.weight.T).log_softmax(-1)
    ids = torch.tensor([i for row in rollouts.completion_ids for i in row])
    assert_close(sampled.logprobs, log_q.gather(-1, ids[:, None])[:, 0], atol=1e-3, rtol=0)
    assert_close(top.logprobs, log_q.topk(4).values, atol=1e-3, rtol=0)
    assert torch.equal(top.ids, log_q.topk(4).indices)


def test_sampled_opd_from_a_server_makes_the_update_of_a_local_teacher(server, tmp_path, train_file):
    options = {"objective": {"type": "opd", "estimator": "sampled"}, "max_steps": 2, "health_tokens": 0}
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "served", train_file, teacher=served(server.url), **options)))
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "local", train_file, **options)))
    ours, theirs = (metrics(tmp_path / name) for name in ("served", "local"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["train/loss/mean"] == pytest.approx(b["train/loss/mean"], abs=1e-3)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-2)


def test_completions_whose_log_probabilities_were_lost_are_left_out_and_counted(server, tmp_path, train_file):
    options = {"objective": {"type": "opd", "estimator": "sampled"}, "max_steps": 1, "health_tokens": 0}
    teacher = served(server.url, max_retries=0, max_lost_share=0.5)
    server.fault = lambda number: "500" if number in {3, 6} else None  # the first is the check at start
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "run", train_file, teacher=teacher, **options)))
    (row,) = metrics(tmp_path / "run")
    assert row["teacher/lost/sum"] == 2
    assert row["train/reverse_kl/mean"] > 0


def test_a_server_with_other_tokens_or_without_log_probabilities_is_refused_at_start(
    server, real, tmp_path, train_file
):
    tree = miniature_recipe(
        tmp_path / "run", train_file, teacher=served(server.url), objective={"type": "opd", "estimator": "sampled"}
    )
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"prompt": [min(i + 1, 261) for i in body["prompt"]]})
    with pytest.raises(ServerError, match=r"answers for other token ids than were sent .* has another tokenizer"):
        build(parse_recipe(tree))
    with pytest.raises(ServerError, match="HTTP 4"):
        build(parse_recipe(tree | {"teacher": real_teacher(real)}))


# What fits what


@pytest.mark.parametrize(
    ("objective", "teacher", "message"),
    [
        (
            {"type": "opd"},
            {},
            "objective 'reverse_kl' needs HiddenTargets; teacher 'server' provides ChunkTargets, Sampled",
        ),
        ({"type": "oprd"}, {}, "objective 'oprd' needs HiddenTargets"),
        ({"type": "nll"}, {}, "needs TextTargets.*type 'rewrite' or 'sequence'"),
    ],
)
def test_an_objective_that_the_server_cannot_serve_is_refused(objective, teacher, message, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "r", train_file, teacher=served("http://127.0.0.1:9/v1"), objective=objective)
    with pytest.raises(TeacherMismatch, match=message):
        build(parse_recipe(tree))


def test_combinations_that_make_no_sense_are_refused_by_the_recipe(tmp_path, train_file):
    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message):
            parse_recipe(miniature_recipe(tmp_path, train_file, **changes))

    local = {"type": "local", "model": str(MODELS / "teacher")}
    sampled = {"type": "opd", "estimator": "sampled"}
    refused(
        "under teacher 'rewrite' the teacher writes", teacher={"type": "rewrite", "teacher": local}, objective=sampled
    )
    refused("without a password", teacher=served("http://me:secret@host/v1"))
    refused("give `tokenizer`", teacher=served("http://host/v1", tokenizer=None))
    refused("max_cost needs price", teacher=served("http://host/v1", max_cost=1.0))
    refused("must contain {completion}", teacher={"type": "rewrite", "teacher": local, "rewrite_prompt": "shorter!"})
    templated = served("http://host/v1", prompt_template="{problem}")
    refused("drop its prompt_template", teacher={"type": "rewrite", "teacher": templated}, objective={"type": "nll"})
    refused("redraw has no meaning", objective={"type": "opd", "redraw": True})
    refused("give embedding_model", objective={"type": "omni_opd", "similarity": "embedding"})


# Faults, in whole runs


def omni_run(folder, train_file, url, **changes):
    teacher = served(url, cache=None) | changes.pop("teacher", {})
    options = {"objective": OMNI, "max_steps": 3, "prompts_per_step": 2, "save_steps": 100, "health_tokens": 0}
    return miniature_recipe(folder, train_file, teacher=teacher, **options | changes)


def test_a_refused_connection_is_said_before_anything_is_loaded(tmp_path, train_file, monkeypatch):
    from oprd.train import build as module

    monkeypatch.setattr(module, "load_student", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ServerError, match=r"no connection. Is it running, is base_url right"):
        build(parse_recipe(omni_run(tmp_path / "run", train_file, FaultyServer().url, teacher={"max_retries": 0})))


def test_a_server_that_ignores_n_is_found_out_at_start(server, tmp_path, train_file):
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"n": 1})
    with pytest.raises(ServerError, match="set many_samples: false"):
        build(parse_recipe(omni_run(tmp_path / "run", train_file, server.url)))


@pytest.mark.parametrize("kind", ["rewrite", "sequence"])
def test_a_server_without_n_that_continues_nothing_is_good_enough_where_whole_texts_are_asked_for(
    kind, server, tmp_path, train_file
):
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"n": 1})
    # this server begins anew after a last assistant message
    teacher = {"type": kind, "teacher": served(server.url, continuation="prefill", tokenizer=None)}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, objective={"type": "nll"}, max_steps=1)
    build(parse_recipe(tree))
    assert server.requests == 1


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_check_at_start_that_fails_says_what_the_server_said(bad, server, tmp_path, train_file):
    server.fault = lambda number: "400" if number == bad else None
    with pytest.raises(ServerError, match=r"HTTP 400: .*too long for me") as caught:
        build(parse_recipe(omni_run(tmp_path / "run", train_file, server.url)))
    assert "many_samples" not in str(caught.value)


def test_a_server_without_log_probabilities_is_refused_with_its_own_words(server, tmp_path, train_file):
    server.fault = lambda number: "400"
    objective = {"type": "opd", "estimator": "sampled"}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=served(server.url), objective=objective)
    with pytest.raises(ServerError, match=r"HTTP 400: .*too long for me.*by 'prompt_logprobs'. If it refuses that"):
        build(parse_recipe(tree))


def test_a_server_that_was_changed_is_checked_again_on_resume(server, tmp_path, train_file):
    tree = omni_run(tmp_path / "run", train_file, server.url, save_steps=1, max_steps=2)
    run_recipe(parse_recipe(tree))
    inner = server.reply
    server.reply = lambda path, body: inner(path, body | {"n": 1})
    with pytest.raises(ServerError, match="set many_samples: false"):
        build(parse_recipe(tree | {"resume_from_checkpoint": "latest"}))


def test_a_run_folder_that_was_moved_keeps_its_account(server, tmp_path, train_file):
    teacher = {"max_requests": 3}
    build(parse_recipe(omni_run(tmp_path / "one", train_file, server.url, teacher=teacher)))
    assert server.requests == 3
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(ServerError, match="could pass max_requests=3"):
        build(parse_recipe(omni_run(tmp_path / "two", train_file, server.url, teacher=teacher)))


def test_a_run_goes_on_without_the_chunks_it_lost(server, tmp_path, train_file):
    server.fault = lambda number: "empty" if number in {8, 9, 10} else None
    teacher = {"max_retries": 2, "concurrency": 1, "max_lost_share": 0.5}
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


def test_no_file_or_line_of_a_run_holds_the_key(server, tmp_path, train_file, monkeypatch, capfd):
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_KEY", secret)
    run_recipe(parse_recipe(omni_run(tmp_path / "run", train_file, server.url, teacher={"api_key_env": "TEST_KEY"})))
    assert set(server.headers) == {f"Bearer {secret}"}
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.name == "teacher_cache.sqlite" for file in files)
    assert not any(secret.encode() in file.read_bytes() for file in files)
    assert secret not in "".join(capfd.readouterr())


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
        objective={"type": "mixture", "terms": [OMNI, {"type": "opd", "estimator": "sampled"}]},
        max_steps=2,
    )
    tree["student"] |= {"lora": {"r": 4}}
    run_recipe(parse_recipe(tree))
    for row in metrics(tmp_path / "run"):
        assert row["teacher_far/requests/sum"] > 0
        assert row["train/omni_opd/mean"] != 0
        assert row["train/reverse_kl/mean"] > 0


def test_a_server_that_continues_and_scores_is_reported_with_all_that_it_was_asked(server, tmp_path, train_file):
    mixture = {"type": "mixture", "terms": [OMNI, {"type": "opd", "estimator": "sampled"}]}
    tree = omni_run(tmp_path / "run", train_file, server.url, objective=mixture, max_steps=2)
    run_recipe(parse_recipe(tree))
    rows = metrics(tmp_path / "run")
    checks = 1 + 3
    assert sum(row["teacher/requests/sum"] for row in rows) == server.requests - checks


def test_two_teachers_that_rewrite_are_reported_together(server, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"problem": f"{i}1+2-{i}", "teacher": name} for i, name in enumerate(["near", "far"] * 2, start=1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {name: {"type": "rewrite", "teacher": served(server.url)} for name in ("near", "far")}
    tree = miniature_recipe(
        tmp_path / "run",
        data,
        teacher={"type": "several", "teachers": teachers},
        objective={"type": "nll"},
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


@pytest.mark.slow
def test_smollm2_behind_a_server_teaches_three_steps_on_real_problems(smollm2, dapo, tmp_path):
    """Its own weights teach it: OmniOPD, then MPD by likelihood, from text alone."""
    # ten tokens are no answer to a real problem, and what has no answer is not rewritten
    easy = tmp_path / "easy.jsonl"
    sums = [{"problem": f"What is {i} + 2? Be brief.", "answer": str(i + 2)} for i in range(8)]
    easy.write_text("".join(json.dumps(row) + "\n" for row in sums))
    with transformers_serve(smollm2, tmp_path / "log.txt") as url:
        teacher = served(url, model=str(smollm2), tokenizer=str(smollm2), many_samples=False, request_timeout_s=120.0)
        omni = OMNI | {"chunk_tokens": 4, "chunks": 1, "continuations": 2}
        rewrite = {"type": "rewrite", "teacher": teacher}
        for name, by, objective, prompts, length in (
            ("omni", teacher, omni, dapo, 10),
            ("mpd", rewrite, {"type": "nll"}, easy, 32),
        ):
            tree = {
                "student": {"model": str(smollm2), "lora": {"r": 8}},
                "teacher": by,
                "objective": objective,
                "data": {"prompts": str(prompts), "limit": 8},
                "rollout": {"group_size": 1, "max_completion_length": length},
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
