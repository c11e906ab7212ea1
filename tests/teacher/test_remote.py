"""Hidden states from `oprd serve-teacher`, a real process on the loopback: the targets and the run of a local teacher."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from transformers import AutoTokenizer

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.data.batching import teacher_batch
from oprd.errors import ConfigError, ServerError
from oprd.plan.plan import Place, Plan, find_device, plan_recipe
from oprd.plan.simulate import FROZEN, STATES
from oprd.recipe import parse_recipe
from oprd.teacher import remote
from oprd.teacher.local import LocalTeacherConfig
from oprd.teacher.remote import RemoteTeacherConfig
from oprd.teacher.serve import Options, serve
from oprd.teacher.wire import Asked
from oprd.train.run import run_recipe
from oprd.types import ALL_TOKENS, HiddenSpec, Prompt, Rollouts, Taps
from serving import free_port, teacher_context
from train.runs import assert_same_weights, metrics, saved_student

pytestmark = pytest.mark.slow
TEACHER, WIDE = str(MODELS / "teacher"), str(MODELS / "wide_teacher")
KEY = "sk-remote-0123456789"
LAST = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)


def start(model: str, port: int, *options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "oprd", "serve-teacher", model, "--port", str(port), *options]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    while True:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.get(f"http://127.0.0.1:{port}/about", timeout=5)
            return process
        time.sleep(0.2)


@contextlib.contextmanager
def served(model: str, *options: str, **environment: str) -> Iterator[str]:
    port = free_port()
    process = start(model, port, *options, **environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(TEACHER, "--dtype", "float32") as found:
        yield found


def built(config: Any, folder: Path, **needs: Any):
    context = teacher_context(folder, **needs)
    facts = config.facts(context)
    return config.build(facts, context)


def rollouts(tokenizer) -> Rollouts:
    texts = [("1+2=", "3"), ("10+20-3=", "30-3=27\n"), ("5=", "")]
    prompts = [tuple(tokenizer(question)["input_ids"]) for question, _ in texts]
    return Rollouts(
        prompts=tuple(
            Prompt(row=i, messages=(), token_ids=ids, teacher_token_ids=ids) for i, ids in enumerate(prompts)
        ),
        completion_ids=tuple(tuple(tokenizer(answer)["input_ids"]) if answer else () for _, answer in texts),
        finished=(True,) * len(texts),
    )


def remote_config(*urls: str, **changes: Any) -> RemoteTeacherConfig:
    return RemoteTeacherConfig(urls=urls, **changes)


@pytest.mark.parametrize("count", [1, 3], ids=["one server", "three in turn"])
def test_its_targets_are_the_local_ones_to_bfloat16_rounding(count, url, tmp_path):
    every = tuple(HiddenSpec(block=b, at="token", tokens=ALL_TOKENS) for b in range(1, 5))
    taps = Taps(hidden=(*every, LAST), head=True)
    ours = built(remote_config(*[url] * count), tmp_path, taps=taps)
    theirs = built(LocalTeacherConfig(model=TEACHER, dtype="float32"), tmp_path, taps=taps)
    given = rollouts(ours.model.lm.tokenizer)
    a, b = ours.targets(given, taps).teacher, theirs.targets(given, taps).teacher
    for spec in taps.hidden:
        assert a.hidden[spec].dtype == torch.bfloat16
        assert_close(a.hidden[spec].float(), b.hidden[spec], rtol=2**-8, atol=2**-8)
    assert torch.equal(a.head.weight, b.head.weight)
    assert (a.head.scale, a.head.softcap, a.head.bias) == (b.head.scale, b.head.softcap, b.head.bias)
    assert ours.comparable(given, every) == every


@pytest.mark.parametrize(
    "objective", [{"type": "oprd", "tokens": "all"}, {"type": "opd"}, {"type": "opd_sampled"}], ids=lambda o: o["type"]
)
def test_a_run_ends_where_the_local_one_ends(objective, url, tmp_path, train_file):
    def run(name: str, teacher: dict[str, Any]) -> Path:
        tree = miniature_recipe(tmp_path / name, train_file, teacher=teacher, objective=objective, max_steps=3)
        return run_recipe(parse_recipe(tree)).run_folder

    local = run("local", {"type": "local", "model": TEACHER, "dtype": "float32"})
    ours = run("remote", {"type": "remote", "urls": [url]})
    for a, b in zip(metrics(local), metrics(ours), strict=True):
        assert a["train/loss/mean"] == pytest.approx(b["train/loss/mean"], rel=5e-3, abs=5e-3)
        assert a["tokens/generated/sum"] == b["tokens/generated/sum"]
        assert a["health/cosine_block_02/mean"] == pytest.approx(b["health/cosine_block_02/mean"], abs=1e-3)
    assert_same_weights(saved_student(local), saved_student(ours), atol=5e-3)


def test_a_teacher_of_another_tokenizer_is_read_at_the_aligned_tokens(tmp_path, train_file):
    with served(WIDE, "--dtype", "float32") as url:
        losses = []
        for name, teacher in (
            ("local", {"type": "local", "model": WIDE, "dtype": "float32"}),
            ("remote", {"type": "remote", "urls": [url]}),
        ):
            tree = miniature_recipe(
                tmp_path / name, train_file, teacher=teacher, objective={"type": "opd_sampled"}, max_steps=2
            )
            losses.append([row["train/loss/mean"] for row in metrics(run_recipe(parse_recipe(tree)).run_folder)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_server_that_is_killed_and_started_again_is_waited_for(tmp_path, train_file, monkeypatch):
    port, sent, real = free_port(), list[str](), remote.Servers._send
    processes: list[subprocess.Popen | None] = [start(TEACHER, port, "--dtype", "float32")]

    def send(self, url, method, path, body):
        sent.append(path)
        if sent.count("/hidden") == 4 and len(processes) == 1:
            processes[0].kill()
            processes[0].wait()
            processes.append(None)  # from here on it is away
            threading.Thread(target=lambda: processes.append(start(TEACHER, port, "--dtype", "float32"))).start()
        return real(self, url, method, path, body)

    def run(name: str) -> Path:
        teacher = {"type": "remote", "urls": [f"http://127.0.0.1:{port}"]}
        tree = miniature_recipe(tmp_path / name, train_file, teacher=teacher, objective={"type": "opd"}, max_steps=3)
        return run_recipe(parse_recipe(tree)).run_folder

    try:
        whole = run("whole")
        sent.clear()
        monkeypatch.setattr(remote.Servers, "_send", send)
        broken = run("broken")
        assert len(processes) == 3, "it was killed"
        assert_same_weights(saved_student(whole), saved_student(broken), atol=0.0)
    finally:
        for process in filter(None, processes):
            process.kill()
            process.wait()


def test_other_weights_than_the_run_began_with_are_refused(url, tmp_path):
    built(remote_config(url), tmp_path, taps=Taps(hidden=(LAST,)))
    changed = load_miniature("teacher")
    with torch.no_grad():
        next(iter(changed.model.parameters())).mul_(1.01)
    changed.model.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(tmp_path / "changed")
    with served(str(tmp_path / "changed"), "--dtype", "float32") as other:
        with pytest.raises(ServerError, match="has other weights or another tokenizer than the run began with"):
            built(remote_config(other), tmp_path, taps=Taps(hidden=(LAST,)))
        with pytest.raises(
            ServerError, match=r"has other weights or another tokenizer than .*; all must serve one model"
        ):
            built(remote_config(url, other), tmp_path, taps=Taps(hidden=(LAST,)))
        # started again with others in the middle of a run
        teacher = built(remote_config(other), tmp_path / "new", taps=Taps(hidden=(LAST,)))
        teacher.model._servers._config = remote_config(url)
        with pytest.raises(ServerError, match=r"refuses: HTTP 409: .*asked for a model of fingerprint"):
            teacher.targets(rollouts(teacher.model.lm.tokenizer), Taps(hidden=(LAST,)))


def test_without_the_key_nothing_is_told_and_the_key_is_in_no_file(tmp_path, train_file, monkeypatch):
    with served(TEACHER, "--api-key-env", "TEACHER_KEY", TEACHER_KEY=KEY) as url:
        with pytest.raises(ServerError, match=r"HTTP 401: .*the key is missing or wrong"):
            built(remote_config(url), tmp_path, taps=Taps(hidden=(LAST,)))
        with pytest.raises(ConfigError, match="TEACHER_KEY, which is not set"):
            built(remote_config(url, api_key_env="TEACHER_KEY"), tmp_path, taps=Taps(hidden=(LAST,)))
        monkeypatch.setenv("TEACHER_KEY", KEY)
        teacher = {"type": "remote", "urls": [url], "api_key_env": "TEACHER_KEY"}
        tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, objective={"type": "opd"}, max_steps=1)
        run_recipe(parse_recipe(tree))
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


ALIGNMENT = {"teacher_ids": [], "student_length": 2, "student_index": [0], "teacher_index": [0]}


def test_a_key_in_place_of_its_name_is_refused_and_not_shown():
    with pytest.raises(ValidationError, match="must be the name of an environment variable") as refused:
        remote_config("http://teacher:8500", api_key_env=KEY)
    assert KEY not in str(refused.value)


def post(url: str, **changes: Any) -> httpx2.Response:
    about = httpx2.get(f"{url}/about").json()
    body = {
        "fingerprint": about["fingerprint"], "prompt_ids": [[1, 2]], "completion_ids": [[3]], "alignments": None,
        "taps": [{"block": "last", "at": "token", "tokens": {"keep": "all", "k": 0}}],
    } | changes  # fmt: skip
    return httpx2.post(f"{url}/hidden", content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("changes", "status", "why"),
    [
        ({"prompt_ids": [[1, 10**6]]}, 400, "a token id that the vocabulary of"),
        ({"prompt_ids": [[-1]]}, 400, "a token id that the vocabulary of"),
        ({"prompt_ids": [[1] * 65]}, 400, "66 tokens in one request; at most 64 are read at once"),
        ({"prompt_ids": [[]]}, 400, "rows that each have a prompt"),
        ({"completion_ids": [[3], [4]]}, 400, "rows that each have a prompt"),
        ({"taps": []}, 400, "needs taps"),
        ({"alignments": [ALIGNMENT | {"teacher_index": [1, 0], "student_index": [0, 1]}]}, 400, "points outside its completion"),
        ({"alignments": [ALIGNMENT | {"teacher_index": [-1]}]}, 400, "points outside its completion"),
        ({"alignments": [ALIGNMENT | {"teacher_index": [0, 1]}]}, 422, "alignments"),
        ({"alignments": [ALIGNMENT] * 2}, 400, "rows that each have a prompt"),
        ({"taps": [{"block": 1, "at": "token", "tokens": {"keep": "all", "k": 0}}]}, 400, "block 1 is not served"),
        ({"taps": [{"block": 7, "at": "token", "tokens": {"keep": "all", "k": 0}}]}, 400, "block 7 is not served"),
        ({"fingerprint": "0" * 64}, 409, "asked for a model of fingerprint"),
        ({"prompt_ids": "text"}, 422, "prompt_ids"),
        ({"prompt_ids": [[1]] * 10**6}, 413, "a body of"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_refused_and_the_server_goes_on(changes, status, why, small):
    answer = post(small, **changes)
    assert answer.status_code == status
    assert why in answer.text
    assert post(small).status_code == 200


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    with served(TEACHER, "--blocks", "last", "--max-tokens", "64") as found:
        yield found


def test_of_a_server_of_the_last_block_more_is_refused_at_the_start_and_health_compares_that_block(
    small, tmp_path, train_file
):
    def tree(objective: dict[str, Any]) -> dict[str, Any]:
        teacher = {"type": "remote", "urls": [small]}
        return miniature_recipe(
            tmp_path / objective["type"], train_file, teacher=teacher, objective=objective, max_steps=1
        )

    with pytest.raises(ConfigError, match=r"does not serve block 1; start it with --blocks all"):
        run_recipe(parse_recipe(tree({"type": "oprd", "tokens": "all", "layers": "all"})))
    (row,) = metrics(run_recipe(parse_recipe(tree({"type": "opd"}))).run_folder)
    assert "health/cosine_block_01/mean" not in row
    assert 0 < row["health/top_16_overlap/mean"] <= 1


def test_what_is_wrong_with_the_command_is_said_before_weights_are_loaded(monkeypatch):
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 lets others reach the teacher"):
        serve(TEACHER, "0.0.0.0", free_port(), Options())
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        serve(TEACHER, "127.0.0.1", free_port(), Options(api_key_env="NO_SUCH_KEY"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"cannot be had: .* in use"):
        serve(TEACHER, "127.0.0.1", taken.getsockname()[1], Options())
    for blocks in ("0", "7", "first", "", "1,9"):
        with pytest.raises(ConfigError, match="give all, last, or numbers from 1 to 4"):
            serve(TEACHER, "127.0.0.1", free_port(), Options(blocks=blocks))


@pytest.mark.parametrize("urls", [(), ("teacher:8500",), ("http://me:secret@teacher:8500",), ("http://t:8500/?key=1",)])
def test_an_address_of_another_form_is_refused(urls):
    with pytest.raises(ValidationError, match="urls must"):
        remote_config(*urls)


def test_an_address_where_no_teacher_is_served_is_named(tmp_path):
    with pytest.raises(ServerError, match=r"does not answer \(ConnectError\)\. Is `oprd serve-teacher` running there"):
        built(remote_config(f"http://127.0.0.1:{free_port()}"), tmp_path, taps=Taps(hidden=(LAST,)))


def test_a_request_survives_json(url):
    about = httpx2.get(f"{url}/about").json()
    lm = load_miniature("teacher")
    batch = teacher_batch(rollouts(lm.tokenizer), pad_id=0, device=torch.device("cpu"))
    asked = Asked.of(batch, Taps(hidden=(LAST,)), about["fingerprint"], range(3))
    again = Asked.model_validate_json(asked.model_dump_json())
    assert again == asked
    assert torch.equal(again.batch(pad_id=0, device=torch.device("cpu")).input_ids, batch.input_ids)


def test_a_plan_counts_its_states_and_none_of_its_weights(url, tmp_path, train_file):
    def plan(teacher: dict[str, Any]) -> Plan:
        objective = {"type": "oprd", "tokens": "all"}
        tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, objective=objective)
        return plan_recipe(parse_recipe(tree), Place(device=find_device("h100")))

    local, ours = plan({"type": "local", "model": TEACHER}), plan({"type": "remote", "urls": [url]})
    weights = sum(x.numel() for x in load_miniature("teacher").model.parameters())
    frozen = local.parts["update"][FROZEN] - ours.parts["update"][FROZEN]
    assert frozen == pytest.approx(2 * weights, rel=0.02)
    assert ours.parts["update"][STATES] == local.parts["update"][STATES] > 0
