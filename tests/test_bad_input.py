"""Bad input: a clear error before anything is loaded or spent, and no traceback on the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import MODELS, load_miniature, miniature_recipe
from oprd.cli import main
from oprd.distributed import Ranks
from oprd.errors import ConfigError, DataError, ModelError, OprdError, RunFolderError, TeacherMismatch
from oprd.recipe import parse_recipe
from oprd.student import InitialStudent
from oprd.train.pair import Given
from oprd.train.setup import check, open_accelerator, setup


@pytest.fixture(autouse=True)
def no_weights_are_loaded(monkeypatch, request):
    """Loading weights fails the test: the error must come before."""
    if "loads" not in request.keywords:

        def load(*args, **kwargs):
            raise AssertionError("weights were loaded before the input was checked")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def refusal(tree, error: type[OprdError]) -> str:
    with pytest.raises(error) as caught:
        setup(parse_recipe(tree))
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
    assert reason in refusal(miniature_recipe(tmp_path / "run", tmp_path / "d.jsonl"), DataError)


def test_a_missing_dataset_is_named(tmp_path):
    message = refusal(miniature_recipe(tmp_path / "run", tmp_path / "none.jsonl"), DataError)
    assert message.endswith("none.jsonl: No such file or directory")


def test_a_prompt_longer_than_the_context_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "1+" * 200 + "1"}) + "\n")
    message = refusal(miniature_recipe(tmp_path / "run", tmp_path / "d.jsonl"), DataError)
    assert "d.jsonl:1: the prompt has 404 tokens, the context less max_completion_length leaves 208" in message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"type": "student", "lambda_on_policy": 0.5}, "rollout.source.lambda_on_policy is 0.5"),
        ({"type": "dataset"}, "rollout.source is 'dataset'"),
    ],
)
def test_the_datasets_completions_are_needed_for_off_policy_steps(source, reason, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file)
    tree["rollout"] |= {"source": source}
    assert f"{reason}, but row 0 has no column 'completion'" in refusal(tree, DataError)


def test_a_benchmark_without_answers_is_refused(tmp_path, train_file):
    (tmp_path / "b.jsonl").write_text('{"problem": "1+1"}\n')
    tree = miniature_recipe(tmp_path / "run", train_file, evaluation={"benchmarks": [str(tmp_path / "b.jsonl")]})
    tree["evaluation"] |= {"max_completion_length": 48}
    assert "row 0 has no column 'answer'" in refusal(tree, DataError)


def test_layers_and_top_k_are_checked_against_the_student(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file)
    assert "block 9; the student has blocks 1 to 4" in refusal(
        tree | {"objective": {"type": "oprd", "layers": [9]}}, ConfigError
    )
    objective = {"type": "opd_top_k", "k": 1000}
    assert "objective.k is 1000; the vocabulary has 262 tokens" in refusal(tree | {"objective": objective}, ConfigError)


def test_a_self_teacher_with_the_students_own_prompt_is_refused(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, teacher={"type": "self"})
    assert "agrees with the student everywhere; give system_prompt or prompt_template" in refusal(tree, ConfigError)


@pytest.mark.parametrize(
    "rollout",
    [
        {"sampling_temperature": 0.5},
        {"top_p": 0.5},
        {"source": {"type": "student", "lambda_on_policy": 0.5}},
        {"source": {"type": "teacher"}},
    ],
    ids=["temperature", "top_p", "lambda", "teacher"],
)
def test_the_sampled_estimator_refuses_tokens_that_are_not_samples_of_the_student(rollout, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, objective={"type": "opd_sampled"})
    tree["rollout"] |= rollout
    message = refusal(tree, TeacherMismatch)
    assert "objective 'opd_sampled' needs tokens sampled from the student's own distribution" in message
    assert "Set sampling_temperature, top_p and lambda_on_policy to 1 and source to 'student'" in message
    for key in rollout.keys() - {"source"}:
        assert f"{key} is 0.5" in message


def test_a_likelihood_refuses_a_source_whose_text_is_all_the_students(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, objective={"type": "nll"})
    assert "Set rollout.source to 'teacher', 'rewrite' or 'dataset'" in refusal(tree, TeacherMismatch)


def test_a_model_that_is_not_there_is_named(tmp_path, train_file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": str(tmp_path / "nothing")})
    assert "nothing" in refusal(tree, ModelError)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, train_file, monkeypatch):
    monkeypatch.setattr("oprd.train.setup.get_available_trackers", lambda: ["tensorboard"])
    message = refusal(miniature_recipe(tmp_path / "run", train_file, report_to=["tensorboard", "wandb"]), ConfigError)
    assert message.startswith("report_to names 'wandb', which is not installed")


def test_a_completion_has_to_fit_the_teachers_context_too(tmp_path, train_file):
    teacher = {"type": "self", "prompt_template": "1+" * 100 + "{problem}"}
    message = refusal(miniature_recipe(tmp_path / "run", train_file, teacher=teacher), DataError)
    assert "its context of 256 is to hold 48 more" in message


def test_a_folder_that_is_not_a_run_is_not_written_to(tmp_path, train_file):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    message = refusal(miniature_recipe(tmp_path / "thesis", train_file), RunFolderError)
    assert "exists and is not a run folder" in message
    message = refusal(miniature_recipe(tmp_path / ("x" * 300), train_file), RunFolderError)
    assert message.endswith("xxx: File name too long; choose another output_dir")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder nobody may write to")
def test_a_folder_without_permission_is_refused(train_file):
    message = refusal(miniature_recipe("/proc/self/run", train_file), RunFolderError)  # not even root may
    assert "cannot write to /proc/self" in message


def test_a_full_disk_is_noticed_before_the_run(tmp_path, train_file, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    message = refusal(miniature_recipe(tmp_path / "run", train_file), RunFolderError)
    assert "GiB free; checkpoints, the student and the teacher's cache need about" in message


def test_prompts_that_do_not_divide_among_processes_are_refused(tmp_path, train_file):
    recipe = parse_recipe(miniature_recipe(tmp_path / "run", train_file))
    ranks = Ranks(open_accelerator(recipe))
    ranks.size = 3
    with pytest.raises(ConfigError, match="prompts_per_step is 4, the processes are 3"):
        check(recipe, Given(), ranks, InitialStudent())


def test_a_teacher_that_gives_text_cannot_serve_an_objective_that_needs_hidden_states(tmp_path, train_file):
    server = {"type": "server", "base_url": "http://127.0.0.1:9/v1", "model": "m", "tokenizer": str(MODELS / "teacher")}
    message = refusal(miniature_recipe(tmp_path / "run", train_file, teacher=server), TeacherMismatch)
    assert (
        "objective 'oprd' needs hidden states and the student's number of blocks and width; teacher 'server'" in message
    )
    assert "provides its most probable tokens, log-probabilities of given tokens, text," in message
    assert "Use a local teacher" in message


@pytest.mark.loads
def test_nan_weights_are_refused_before_the_first_rollout(tmp_path, train_file):
    lm = load_miniature("base")
    with torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    lm.model.save_pretrained(tmp_path / "broken")
    lm.tokenizer.save_pretrained(tmp_path / "broken")
    tree = miniature_recipe(tmp_path / "run", train_file, student={"model": str(tmp_path / "broken")})
    assert r"weight model.layers.0.mlp.up_proj.weight holds NaN" in refusal(tree, ModelError)
    assert not (tmp_path / "run").exists()


@pytest.mark.loads
def test_prompt_learning_adapters_are_refused_with_the_reason(tmp_path, train_file):
    lm = load_miniature("base")
    model = get_peft_model(lm.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    recipe = parse_recipe(miniature_recipe(tmp_path / "run", train_file))
    with pytest.raises(ModelError, match="would bypass"):
        setup(recipe, Given(student=model, tokenizer=lm.tokenizer))


@pytest.fixture
def oprd(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["oprd", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        said = capsys.readouterr()
        return int(exit.value.code or 0), said.out, said.err

    return run


def test_the_command_line_prints_the_error_with_file_and_line(oprd, tmp_path, train_file):
    path = tmp_path / "r.yaml"
    path.write_text("lerning_rate: 1e-4\n" + yaml.safe_dump(miniature_recipe(tmp_path / "run", train_file)))
    code, _, err = oprd("train", path)
    assert code == 2
    assert f"ConfigError: {path}:1: lerning_rate: unknown key (did you mean 'learning_rate'?)" in err


@pytest.mark.slow
def test_a_process_that_meets_bad_input_ends_without_a_traceback(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, data={"prompts": "none.jsonl"})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "oprd", "train", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "DataError: none.jsonl: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed updates weights inside .* use `accelerate launch --use_fsdp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM trains models of its own"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "need whole sequences"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1 was launched"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}, "shards weights on GPUs"),
    ],
)
def test_a_launch_that_cannot_train_is_refused_by_name(variables, reason, tmp_path, train_file, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=reason):
        open_accelerator(parse_recipe(miniature_recipe(tmp_path / "run", train_file)))
    assert not (tmp_path / "run").exists()


def test_show_config_spells_out_every_default_and_reads_back(oprd, tmp_path, train_file):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(miniature_recipe(tmp_path / "run", train_file)))
    code, out, _ = oprd("show-config", tmp_path / "r.yaml", "learning_rate=2e-4")
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["learning_rate"] == 2e-4
    assert shown["objective"]["normalization"] == "none"
    assert parse_recipe(shown).learning_rate == 2e-4


def test_schema_prints_a_json_schema_with_a_description_of_every_key(oprd):
    code, out, _ = oprd("schema")
    assert code == 0
    schema = json.loads(out)
    assert schema["properties"]["micro_batch_tokens"]["description"].startswith("Padded positions")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("aime24", "smaples=4"),
            "ConfigError: smaples: unknown key (did you mean 'samples'?); allowed: ",
        ),
        (("aime24", "samples=0"), "ConfigError: samples: should be greater than 0, got 0"),
        (("samples=4",), "name a benchmark"),
    ],
)
def test_eval_explains_its_keys_as_a_recipe_does(oprd, arguments, reason):
    code, _, err = oprd("eval", MODELS / "teacher", *arguments)
    assert code == 2
    assert reason in err


@pytest.mark.loads
@pytest.mark.slow
def test_eval_scores_a_saved_model_and_keeps_every_verdict(oprd, tmp_path, held_out_file):
    options = ("samples=2", "max_completion_length=64", "sampling_temperature=1.0")
    command = ["eval", MODELS / "teacher", held_out_file, *options, "--out", tmp_path / "out"]
    code, _, err = oprd(*command)
    assert code == 0, err
    rows = [json.loads(x) for x in (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    (score,) = [json.loads(x) for x in (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert score["avg_at_k"] == pytest.approx(sum(row["correct"] for row in rows) / 24)
    assert score["avg_at_k"] > 0.6
    code, _, err = oprd(*command)
    assert code == 2
    assert "holds an evaluation already" in err
