"""Rollouts by vLLM itself: the tokens and log-probabilities of transformers, with the weights that the student has now."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import MODELS, ROOT, load_miniature, miniature_recipe
from oprd.algorithm import Distillation
from oprd.clock import Clock
from oprd.data.batching import student_batch
from oprd.data.chat import render
from oprd.demo.run import HELD_OUT_PROBLEMS, TRAINING_PROBLEMS, demo_recipe
from oprd.demo.task import sums, write_jsonl
from oprd.distributed import Ranks
from oprd.errors import ConfigError, ServerError, TrainingStopped
from oprd.losses.chunked import logprobs_of
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts
from oprd.recipe import parse_recipe
from oprd.rollout.base import EngineContext
from oprd.rollout.hf import HFEngine
from oprd.rollout.vllm import VLLMEngine, VLLMEngineConfig
from oprd.rollout.vllm_server import Server
from oprd.train.checkpoint import find_checkpoint
from oprd.train.loop import train
from oprd.train.rollouts import updates_on
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import ALL_TOKENS, HiddenSpec, Message, Prompt, Rollouts, Taps
from train.runs import assert_same_weights, read_lines, saved_student

vllm = pytest.mark.vllm
VLLM_PYTHON = str(ROOT / ".venv-vllm" / "bin" / "python")
GREEDY = Sampling(temperature=0.0, max_new_tokens=48)
SAMPLED = Sampling(temperature=1.0, max_new_tokens=48, samples=4)


def context(folder: Path, tokens: int = 128) -> EngineContext:
    return EngineContext(ranks=Ranks(Accelerator(cpu=True)), folder=folder, bf16=False, tokens=tokens)


def started(lm: LanguageModel, folder: Path, **options) -> VLLMEngine:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = VLLMEngineConfig(python=VLLM_PYTHON, **options)
    config.check(ModelFacts.read(lm.model, lm.tokenizer), context(folder))
    return config.build(FrozenModel(lm), context(folder))


def prompts(lm: LanguageModel, count: int = 8) -> tuple[Prompt, ...]:
    turns = [(Message(role="user", content=row.problem),) for row in sums(count, seed=5, held_out=True)]
    return tuple(Prompt(row=i, messages=m, token_ids=render(lm.tokenizer, m)) for i, m in enumerate(turns))


def own_logprobs(lm: LanguageModel, rollouts: Rollouts) -> torch.Tensor:
    spec = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS)
    batch = student_batch(rollouts, pad_id=lm.pad_id, device=torch.device("cpu"))
    states = FrozenModel(lm).hidden(batch, Taps(hidden=(spec,), head=True))
    return logprobs_of(states.hidden[spec], states.head, batch.sampled_ids(ALL_TOKENS))


def check_against_transformers(engine: VLLMEngine, lm: LanguageModel) -> None:
    """Equal greedy tokens, and equal log-probabilities of sampled ones, in float32."""
    asked = prompts(lm)
    with engine.session():
        greedy, sampled = engine.generate(asked, GREEDY, seed=0), engine.generate(asked, SAMPLED, seed=1)
    expected = HFEngine(FrozenModel(lm)).generate(asked, GREEDY, seed=0)
    assert greedy.completion_ids == expected.completion_ids
    assert greedy.finished == expected.finished
    assert_close(
        torch.tensor([x for row in sampled.sampling_logprobs for x in row]),
        own_logprobs(lm, sampled),
        atol=2e-5,
        rtol=0,
    )


@torch.no_grad()
def shift(parameters: Iterator[torch.nn.Parameter], scale: float) -> None:
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * scale * parameter.std().nan_to_num(1.0))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_miniature("base")


@pytest.fixture(scope="module")
def engine(lm, tmp_path_factory) -> Iterator[VLLMEngine]:
    engine = started(lm, tmp_path_factory.mktemp("engine"))
    engine.sync_weights()
    yield engine
    engine.close()


@vllm
def test_it_writes_what_transformers_writes_and_every_weight_that_changes_reaches_it(engine, lm):
    check_against_transformers(engine, lm)
    before = engine.generate(prompts(lm), GREEDY, seed=0)
    shift(lm.model.parameters(), 0.1)  # embedding and LM head, which are one tensor, included
    check_against_transformers(engine, lm)
    assert engine.generate(prompts(lm), GREEDY, seed=0) != before


@vllm
def test_a_seed_gives_the_same_completions_and_a_group_does_not_repeat_itself(engine, lm):
    asked = prompts(lm, 2) * 2
    warm = Sampling(temperature=2.0, max_new_tokens=30, samples=8)
    with engine.session():
        one, again, other = (engine.generate(asked, warm, seed=seed) for seed in (3, 3, 4))
    assert one.completion_ids == again.completion_ids
    assert one.completion_ids != other.completion_ids
    assert [p.row for p in one.prompts] == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8
    assert len(set(one.completion_ids)) == 32, "neither samples of a prompt nor equal prompts share random numbers"


@vllm
def test_completions_end_at_the_runs_stop_ids_alone_and_a_cut_one_is_unfinished(engine, lm):
    newline = lm.tokenizer("\n")["input_ids"][0]
    lm.model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, newline]
    lm.model.generation_config.top_k = 1  # the student's own defaults change nothing
    several = LanguageModel(model=lm.model, tokenizer=lm.tokenizer, name="several stops")
    engine._model = FrozenModel(several)
    try:
        with engine.session():
            written = engine.generate(prompts(lm), SAMPLED, seed=0)
            cut = engine.generate(prompts(lm), Sampling(temperature=1.0, max_new_tokens=3), seed=0)
    finally:
        engine._model = FrozenModel(lm)
        lm.model.generation_config.eos_token_id, lm.model.generation_config.top_k = lm.tokenizer.eos_token_id, None
    stops = set(several.stop_ids)
    assert newline in stops
    for ids, finished in zip(written.completion_ids, written.finished, strict=True):
        assert not stops & set(ids[:-1])
        assert finished == (ids[-1] in stops)
    assert any(written.finished)
    assert cut.max_new_tokens == 3
    assert {len(ids) for ids, finished in zip(cut.completion_ids, cut.finished, strict=True) if not finished} == {3}
    assert len(set(written.completion_ids)) > len(prompts(lm)), "not greedy"


@vllm
def test_first_tokens_have_the_frequencies_of_temperature_and_top_p(engine, lm):
    """Each frequent token within 4.5 standard errors of the softmax at temperature 1.5, cut to the top 90%."""
    (prompt,), count = prompts(lm, 1), 1000
    with engine.session():
        drawn = engine.generate(
            (prompt,), Sampling(temperature=1.5, top_p=0.9, max_new_tokens=1, samples=count), seed=7
        )
    with torch.no_grad():
        p = (lm.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1] / 1.5).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[(p[order].cumsum(0) - p[order]) < 0.9]
    p = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
    firsts = torch.tensor([ids[0] for ids in drawn.completion_ids])
    frequency = torch.bincount(firsts, minlength=len(p)) / count
    assert set(firsts.tolist()) <= set(kept.tolist())
    likely = p > 5 / count
    assert float(((frequency - p).abs() / (p * (1 - p) / count).sqrt().clamp_min(1e-9))[likely].max()) < 4.5


@pytest.fixture
def recipe(engine, train_file, held_out_file, tmp_path):
    """A run on the module's server, as on one that the user has started."""
    url = engine._servers[0].url

    def make(**changes: Any) -> dict[str, Any]:
        rollout = {"group_size": 2, "max_completion_length": 48, "engine": {"type": "vllm", "urls": [url, url]}}
        scored = {"benchmarks": [str(held_out_file)], "samples": 2, "max_completion_length": 48}
        return miniature_recipe(tmp_path / "run", train_file, rollout=rollout, evaluation=scored) | changes

    return make


@vllm
def test_a_run_with_evaluations_and_searches_always_writes_with_its_present_weights(recipe, tmp_path):
    search = {"every": 2, "validation_prompts": 4, "score": "accuracy"}
    run_recipe(parse_recipe(recipe(eval_steps=2, extrapolation=search)))
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 4
    assert all(0 < row["rollout/logprob_difference/mean"] < 2e-5 for row in rows)
    assert [row["step"] for row in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [0, 2, 4]
    assert read_lines(tmp_path / "run" / "searches.jsonl")


@vllm
def test_a_student_learns_as_much_as_with_transformers(engine, tmp_path):
    """The demo's OPRD run, half as long, once with each engine; two runs differ by 0.03 for no reason."""
    train_file, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    write_jsonl(train_file, sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(held_out, sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    scores = []
    for number, config in enumerate(({"type": "hf"}, {"type": "vllm", "urls": [engine._servers[0].url]})):
        recipe = demo_recipe("oprd", tmp_path / str(number), train_file, held_out, seed=0)
        rollout = recipe.rollout.model_dump() | {"engine": config}
        tree = recipe.model_dump() | {"max_steps": 100, "rollout": rollout}
        scores.append(run_recipe(parse_recipe(tree)).result.evaluations[0].avg_at_k)
    assert min(scores) > 0.7  # 0.30 before
    assert abs(scores[0] - scores[1]) < 0.06


@vllm
def test_a_resumed_run_draws_the_same_completions(recipe, tmp_path):
    run_recipe(parse_recipe(recipe()))
    folder, first = tmp_path / "run", tmp_path / "first"
    shutil.copytree(folder, first)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000004")  # as if it had died in step 4
    run_recipe(parse_recipe(recipe(resume_from_checkpoint="latest")))
    assert read_lines(folder / "samples.jsonl") == read_lines(first / "samples.jsonl")
    assert_same_weights(saved_student(folder), saved_student(first), atol=1e-6)


@vllm
def test_weights_that_do_not_arrive_stop_the_run(recipe, tmp_path, monkeypatch):
    load, loaded = Server.load, []

    def load_twice(self, folder, *, adapter):
        if len(loaded) < 2:  # one for each of the urls
            loaded.append(load(self, folder, adapter=adapter))

    monkeypatch.setattr(Server, "load", load_twice)
    with pytest.raises(TrainingStopped, match=r"differ by .* weights did not reach the engine.*Stopped before step 2"):
        run_recipe(parse_recipe(recipe()))
    assert find_checkpoint(tmp_path / "run" / "checkpoints", "latest").name == "step-000001"


@vllm
def test_stale_updates_take_their_importance_weights_from_vllm(recipe):
    tree = recipe(objective={"type": "opd_sampled"})
    parts = setup(parse_recipe(tree | {"rollout": tree["rollout"] | {"updates_per_rollout": 2}}))
    with parts.engine.session():
        rollouts = parts.engine.generate(parts.prompts[:4], SAMPLED, seed=0)
    seen: list[Rollouts] = []
    update = Distillation.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "update", lambda self, r, *rest: seen.append(r) or update(self, r, *rest))
        updates_on(parts, rollouts, 1, Clock(torch.device("cpu")))
        one = replace(parts, recipe=parse_recipe(tree))
        updates_on(one, rollouts, 1, Clock(torch.device("cpu")))
    assert [r.sampling_logprobs for r in seen] == [rollouts.sampling_logprobs] * 2 + [None]


@vllm
def test_rollouts_ahead_are_written_by_weights_a_step_old_and_weighted_by_their_log_probabilities(recipe, tmp_path):
    tree = recipe(objective={"type": "opd_sampled"}, eval_steps=2, learning_rate=3e-4)
    parts = setup(parse_recipe(tree | {"rollout": tree["rollout"] | {"rollouts_ahead": 1}}))
    learned: list[tuple[Rollouts, torch.Tensor]] = []
    update = Distillation.update

    def spied(self, rollouts, step, clock):
        learned.append((rollouts, own_logprobs(self.student.lm, rollouts)))
        return update(self, rollouts, step, clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "update", spied)
        train(parts)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["rollout/staleness/last"] for row in rows] == [0, 1, 1, 1]
    assert all(0 < row["rollout/logprob_difference/mean"] < 2e-5 for row in rows), "of what present weights write"
    assert [[p.row for p in r.prompts[::2]] for r, _ in learned] == [
        [p.row for p in parts.sampler.batch(i)] for i in range(4)
    ]
    assert learned[0][0].sampling_logprobs is None, "on-policy"
    apart = [
        float((torch.tensor([x for row in r.sampling_logprobs for x in row]) - own).abs().mean())
        for r, own in learned[1:]
    ]
    assert all(difference > 1e-4 for difference in apart), "of the weights that sampled them, not of those that learn"


@vllm
def test_a_server_that_does_not_fit_the_student_is_refused(engine, lm, tmp_path):
    student, url = ModelFacts.read(lm.model, lm.tokenizer), engine._servers[0].url
    VLLMEngineConfig(urls=(url,)).check(student, context(tmp_path))
    with pytest.raises(ConfigError, match="writes up to 128 tokens, the longest prompt and completion have 129"):
        VLLMEngineConfig(urls=(url,)).check(student, context(tmp_path, tokens=129))
    with pytest.raises(ConfigError, match=r"serves 'student', which splits .* start it with the student's model"):
        VLLMEngineConfig(urls=(url,)).check(ModelFacts.read(str(MODELS / "wide_teacher")), context(tmp_path))


@vllm
@pytest.mark.parametrize("own", [False, True], ids=["shared servers", "a server each"])
def test_two_processes_share_servers_but_not_a_device(own, recipe, tmp_path):
    tree = recipe(evaluation={"benchmarks": []})
    if own:
        tree["rollout"]["engine"] = {"type": "vllm", "python": VLLM_PYTHON}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = ["-m", "accelerate.commands.launch", *options, "--main_process_port=0", "-m", "oprd", "train"]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, timeout=500,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
    )  # fmt: skip
    if own:
        assert done.returncode
        assert "some share a device (cpu:0)" in done.stderr, done.stderr
        return
    assert not done.returncode, done.stderr
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 4
    assert all(0 < row["rollout/logprob_difference/mean"] < 2e-5 for row in rows)


@vllm
def test_of_a_student_with_an_adapter_the_adapter_alone_is_sent(tmp_path):
    lm = load_miniature("base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    student = LanguageModel(model=get_peft_model(lm.model, lora), tokenizer=lm.tokenizer, name="adapter")
    engine = started(student, tmp_path)
    try:
        for scale in (0.1, 0.2):
            shift((p for name, p in student.model.named_parameters() if "lora_" in name), scale)
            check_against_transformers(engine, student)
    finally:
        engine.close()
    assert {file.name for file in (tmp_path / "weights").glob("*.safetensors")} == {"adapter_model.safetensors"}


@vllm
def test_smollm2_writes_the_same_greedy_tokens(smollm2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    lm = LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(smollm2), name="SmolLM2")
    turns = [(Message(role="user", content=text),) for text in ("What is 12+34-5?", "Name a river in France.")]
    asked = tuple(Prompt(row=i, messages=m, token_ids=render(lm.tokenizer, m)) for i, m in enumerate(turns))
    engine, greedy = started(lm, tmp_path), Sampling(temperature=0.0, max_new_tokens=24)
    try:
        with engine.session():
            written = engine.generate(asked, greedy, seed=0)
    finally:
        engine.close()
    assert written.completion_ids == HFEngine(FrozenModel(lm)).generate(asked, greedy, seed=0).completion_ids


@vllm
def test_a_hanging_and_a_killed_engine_are_reported_with_their_last_words(tmp_path):
    lm = load_miniature("base")
    engine = started(lm, tmp_path)
    try:
        with engine.session():
            engine.generate(prompts(lm, 1), GREEDY, seed=0)
        (server,) = engine._servers
        children = psutil.Process(server._process._process.pid).children(recursive=True)
        (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        core.send_signal(signal.SIGSTOP)
        server._client.timeout = 2.0
        with pytest.raises(ServerError, match=r"no answer to /v1/completions within rollout.engine.timeout_s"):
            engine.generate(prompts(lm, 1), GREEDY, seed=0)
        server._client.timeout = 600.0
        core.kill()
        with pytest.raises(
            ServerError, match=f"(?s)vLLM at http.*{re.escape(str(tmp_path))}/vllm-0.log:\n.*EngineCore"
        ):
            engine.generate(prompts(lm, 1), GREEDY, seed=0)
        with pytest.raises(ServerError, match=f"vLLM at http.*{re.escape(str(tmp_path))}"), engine.session():
            pass
    finally:
        engine.close()
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):  # none is left over
        time.sleep(0.1)


def test_what_is_wrong_with_the_environment_is_said_before_anything_is_loaded(tmp_path):
    student = ModelFacts.read(str(MODELS / "base"))
    with pytest.raises(ConfigError, match=rf"{re.escape(sys.executable)} has no vLLM: install it there"):
        VLLMEngineConfig(python=sys.executable).check(student, context(tmp_path))
    with pytest.raises(ConfigError, match=r"rollout.engine.python: cannot run '/no/python'"):
        VLLMEngineConfig(python="/no/python").check(student, context(tmp_path))
    with pytest.raises(ServerError, match=r"no connection to vLLM at http://127.0.0.1:9"):
        VLLMEngineConfig(urls=("http://127.0.0.1:9",)).check(student, context(tmp_path))


@pytest.mark.parametrize(
    "rollout",
    [
        {},
        {"engine": {"type": "vllm"}},
        {"engine": {"type": "vllm", "urls": ["http://a:1"]}, "source": {"type": "teacher"}},
    ],
)
def test_rollouts_ahead_are_refused_where_nothing_can_write_beside_the_training(rollout, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, rollout=rollout | {"rollouts_ahead": 1})
    with pytest.raises(ConfigError, match=r"rollouts_ahead is 1, .* set engine.urls .* or rollouts_ahead=0"):
        parse_recipe(tree)
