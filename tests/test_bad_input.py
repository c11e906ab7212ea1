"""Bad input: a clear error before anything is loaded or spent, and no traceback on the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PromptTuningConfig, get_peft_model

from conftest import MODELS, load_miniature, miniature_recipe
from oprd import models
from oprd.config.reading import parse_recipe
from oprd.errors import ConfigError, DataError, ModelError, RunFolderError, TeacherMismatch
from oprd.train.build import build
from oprd.train.check import Given, check


@pytest.fixture(autouse=True)
def no_weights_are_loaded(monkeypatch, request):
    """Loading weights fails the test: the error must come before."""
    if "loads" not in request.keywords:

        def load(*args, **kwargs):
            raise AssertionError("weights were loaded before the input was checked")

        monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)


def refused(tree, error) -> str:
    with pytest.raises(error) as caught:
        build(parse_recipe(tree))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the dataset is empty"),
        ('{"problem": "1+1"}\nnot json\n', "d.jsonl:2: not JSON"),
        ('{"problem": "1+1"}\n[1]\n', "d.jsonl:2: must be a JSON object, got list"),
        ('{"text": "1+1"}\n', "d.jsonl:1: needs one of the columns prompt, problem, question, has text"),
        ('{"problem": ""}\n', "d.jsonl:1: column 'problem' must be non-empty text, got ''"),
        ('{"messages": [{"role": "user"}]}\n', "d.jsonl:1: a message must have text 'role' and 'content'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "no message before the assistant's"),
    ],
)
def test_a_malformed_dataset_is_named_with_its_line(content, reason, tmp_path):
    (tmp_path / "d.jsonl").write_text(content)
    assert reason in refused(miniature_recipe(tmp_path / "run", tmp_path / "d.jsonl"), DataError)


def test_a_missing_dataset_is_named(tmp_path):
    message = refused(miniature_recipe(tmp_path / "run", tmp_path / "none.jsonl"), DataError)
    assert message.endswith("none.jsonl: No such file or directory")


def test_a_prompt_longer_than_the_context_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "1+" * 200 + "1"}) + "\n")
    message = refused(miniature_recipe(tmp_path / "run", tmp_path / "d.jsonl"), DataError)
    assert "d.jsonl:1: the prompt has 404 tokens, the context less max_completion_length leaves 208" in message


def test_given_completions_are_needed_for_off_policy_steps(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file)
    tree["rollout"] |= {"lambda_on_policy": 0.5}
    assert "row 0 of" in refused(tree, DataError)


def test_a_benchmark_without_answers_is_refused(tmp_path, train_file):
    (tmp_path / "b.jsonl").write_text('{"problem": "1+1"}\n')
    tree = miniature_recipe(tmp_path / "run", train_file, evaluation={"benchmarks": [str(tmp_path / "b.jsonl")]})
    tree["evaluation"] |= {"max_completion_length": 48}
    assert "row 0 has no column 'answer'" in refused(tree, DataError)


def test_layers_and_top_k_are_checked_against_the_student(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file)
    assert "block 9; the student has blocks 1 to 4" in refused(
        tree | {"objective": {"type": "oprd", "layers": [9]}}, ConfigError
    )
    objective = {"type": "opd", "estimator": "top_k", "top_k": 1000}
    assert "top_k is 1000; the vocabulary has 262 tokens" in refused(tree | {"objective": objective}, ConfigError)


def test_a_model_that_is_not_there_is_named(tmp_path, train_file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": str(tmp_path / "nothing")})
    assert "nothing" in refused(tree, ModelError)


def test_a_folder_that_is_not_a_run_is_not_written_to(tmp_path, train_file):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    message = refused(miniature_recipe(tmp_path / "thesis", train_file), RunFolderError)
    assert "exists and is not a run folder" in message


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder nobody may write to")
def test_a_folder_without_permission_is_refused(train_file):
    message = refused(miniature_recipe("/proc/self/run", train_file), RunFolderError)  # not even root may
    assert "cannot write to /proc/self" in message


def test_a_full_disk_is_noticed_before_the_run(tmp_path, train_file, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    message = refused(miniature_recipe(tmp_path / "run", train_file), RunFolderError)
    assert "GiB free, checkpoints and the student need about" in message


def test_prompts_that_do_not_divide_among_processes_are_refused(tmp_path, train_file):
    recipe = parse_recipe(miniature_recipe(tmp_path / "run", train_file))
    with pytest.raises(ConfigError, match="prompts_per_step is 4, the processes are 3"):
        check(recipe, Given(), world_size=3)


def test_a_teacher_that_gives_text_cannot_serve_an_objective_that_needs_hidden_states(tmp_path, train_file):
    server = {"type": "server", "base_url": "http://127.0.0.1:9/v1", "model": "m", "tokenizer": str(MODELS / "teacher")}
    message = refused(miniature_recipe(tmp_path / "run", train_file, teacher=server), TeacherMismatch)
    assert "objective 'oprd' needs HiddenTargets; teacher 'server' provides ChunkTargets, SampledTargets" in message
    assert "Use a local teacher" in message


@pytest.mark.loads
def test_nan_weights_are_refused_before_the_first_rollout(tmp_path, train_file):
    lm = load_miniature("base")
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    lm.model.save_pretrained(tmp_path / "broken")
    lm.tokenizer.save_pretrained(tmp_path / "broken")
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": str(tmp_path / "broken")})
    assert r"weight model.layers.0.mlp.up_proj.weight holds NaN" in refused(tree, ModelError)
    assert not (tmp_path / "run").exists()


@pytest.mark.loads
def test_prompt_learning_adapters_are_refused_with_the_reason(tmp_path, train_file):
    lm = load_miniature("base")
    model = get_peft_model(lm.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    recipe = parse_recipe(miniature_recipe(tmp_path / "run", train_file))
    with pytest.raises(ModelError, match="would bypass"):
        build(recipe, Given(student=model, tokenizer=lm.tokenizer))


@pytest.mark.loads
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lerning_rate": 1e-4}, "ConfigError: lerning_rate: unknown key (did you mean 'learning_rate'?)"),
        ({"data": {"prompts": "none.jsonl"}}, "DataError: none.jsonl: No such file or directory"),
    ],
)
def test_the_command_line_tells_the_error_without_a_traceback(changes, told, tmp_path, train_file):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(miniature_recipe(tmp_path / "run", train_file) | changes))
    done = subprocess.run(
        [sys.executable, "-m", "oprd", "train", str(tmp_path / "r.yaml")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.loads
def test_show_config_spells_out_every_default_and_reads_back(tmp_path, train_file):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(miniature_recipe(tmp_path / "run", train_file)))
    command = [sys.executable, "-m", "oprd", "show-config", str(tmp_path / "r.yaml"), "learning_rate=2e-4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = yaml.safe_load(done.stdout)
    assert shown["learning_rate"] == 2e-4
    assert shown["objective"]["normalization"] == "none"
    assert parse_recipe(shown).learning_rate == 2e-4


@pytest.mark.loads
def test_eval_scores_a_saved_model_and_keeps_every_verdict(tmp_path, held_out_file):
    command = [
        sys.executable, "-m", "oprd", "eval", str(MODELS / "teacher"), str(held_out_file), "--samples", "2",
        "--max-completion-length", "64", "--temperature", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    (score,) = [json.loads(x) for x in (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert score["avg_at_k"] == pytest.approx(sum(row["correct"] for row in rows) / 24)
    assert score["avg_at_k"] > 0.6
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2
    assert "holds an evaluation already" in again.stderr
