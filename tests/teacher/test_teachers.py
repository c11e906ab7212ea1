"""Teachers see their own prompt; completions are paired by position."""

import json

import datasets
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

import oprd
from conftest import MODELS, load_miniature, miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.data.collate import collate
from oprd.errors import DataError, TeacherMismatch
from oprd.models import check_same_tokens, read_states
from oprd.teacher.local import LocalTeacher
from oprd.train.build import build
from oprd.train.log import Clock
from oprd.train.run import run_recipe
from oprd.train.update import update_step
from oprd.types import Message, Prompt, Reading, Rollouts, TokenSelection

READING = Reading(block=4, at="completion", tokens=TokenSelection(keep="all"))


def rollouts(lm, teacher: str | None = None) -> Rollouts:
    prompts = tuple(
        Prompt(
            row=i,
            messages=(Message(role="user", content=text),),
            token_ids=tuple(lm.tokenizer(text)["input_ids"]),
            teacher=teacher,
            columns={"problem": text, "solution": "41"},
        )
        for i, text in enumerate(["12+34-5", "1+2"])
    )
    ids = tuple(tuple(lm.tokenizer(text)["input_ids"]) for text in ["12+34=46", "3"])
    return Rollouts(prompts=prompts, completion_ids=ids, finished=(True, True))


def test_a_teacher_with_another_prompt_reads_the_same_completions_behind_it(teacher_lm):
    given = rollouts(teacher_lm)
    teacher = LocalTeacher(
        teacher_lm, context=256, system_prompt="Be right.", prompt_template="{problem} is {solution}"
    )
    got = teacher.targets(given, [READING], head=False).hidden[READING]
    prompts = [
        teacher_lm.tokenizer.apply_chat_template(
            [{"role": "system", "content": "Be right."}, {"role": "user", "content": f"{text} is 41"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for text in ("12+34-5", "1+2")
    ]
    alone = []
    for prompt, completion in zip(prompts, given.completion_ids, strict=True):
        ids = teacher_lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        out = teacher_lm.model(input_ids=torch.tensor([[*ids, *completion]]), output_hidden_states=True)
        alone.append(out.hidden_states[-1][0, len(ids) :])
    assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert len(got) == sum(given.lengths)


def test_targets_never_carry_gradient(teacher_lm):
    teacher_lm.model.requires_grad_(True)
    targets = LocalTeacher(teacher_lm, context=256).targets(rollouts(teacher_lm), [READING], head=True)
    assert not targets.hidden[READING].requires_grad


def test_a_template_column_that_is_missing_and_a_prompt_too_long_are_refused_before_training(teacher_lm):
    with pytest.raises(DataError, match=r"asks for \{proof\}, the dataset has problem, solution"):
        LocalTeacher(teacher_lm, context=256, prompt_template="{proof}").check_prompts(rollouts(teacher_lm).prompts)
    with pytest.raises(DataError, match="row 0: the teacher's prompt has"):
        LocalTeacher(teacher_lm, context=8).check_prompts(rollouts(teacher_lm).prompts)


def test_a_full_weight_self_teacher_is_a_frozen_copy_of_the_start(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, teacher={"type": "self", "prompt_template": "{problem}="})
    run = build(parse_recipe(tree))
    before = run.teacher.targets(rollouts(run.lm), [READING], head=False).hidden[READING]
    with torch.no_grad():
        for parameter in run.lm.model.parameters():
            parameter.add_(0.1)
    after = run.teacher.targets(rollouts(run.lm), [READING], head=False).hidden[READING]
    assert torch.equal(before, after)


def test_a_lora_self_teacher_is_the_student_with_its_adapter_off(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, teacher={"type": "self", "prompt_template": "{problem}="})
    tree["student"] |= {"lora": {"r": 4}}
    run = build(parse_recipe(tree))
    before = run.teacher.targets(rollouts(run.lm), [READING], head=False).hidden[READING]
    with torch.no_grad():
        for parameter in run.lm.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = run.teacher.targets(rollouts(run.lm), [READING], head=False).hidden[READING]
    assert torch.equal(before, after)
    batch = collate([[1, 2]], [[3, 4]], pad_id=0, device=torch.device("cpu"))
    changed = read_states(run.lm, batch, [READING], head=False).hidden[READING]
    base = load_miniature("base")
    start = read_states(base, batch, [READING], head=False).hidden[READING]
    assert float((changed - start).detach().abs().max()) > 0.1


def test_each_prompt_is_answered_by_the_teacher_it_names(tmp_path):
    data = tmp_path / "d.jsonl"
    names = ["good", "bad", "good", "bad"]
    data.write_text("".join(json.dumps({"problem": f"{i}+2", "teacher": n}) + "\n" for i, n in enumerate(names)))
    teachers = {
        "good": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "bad": {"type": "local", "model": str(MODELS / "base"), "dtype": "float32"},
    }
    tree = miniature_recipe(tmp_path / "run", data, teacher={"type": "several", "teachers": teachers}, max_steps=1)
    run = build(parse_recipe(tree))
    for name in ("good", "bad"):
        lm = load_miniature("teacher" if name == "good" else "base")
        one = rollouts(lm, teacher=name)
        expected = LocalTeacher(lm, context=256).targets(one, [READING], head=False).hidden[READING]
        assert_close(run.teacher.targets(one, [READING], head=False).hidden[READING], expected)
    run_recipe(parse_recipe(tree | {"output_dir": str(tmp_path / "second")}))
    data.write_text(json.dumps({"problem": "1+2", "teacher": "other"}) + "\n")
    with pytest.raises(DataError, match="column 'teacher' is 'other', allowed: good, bad"):
        build(parse_recipe(tree))


def test_models_and_datasets_can_be_objects(tmp_path):
    base, teacher = load_miniature("base"), load_miniature("teacher")
    before = base.model.state_dict()["model.norm.weight"].clone()
    done = oprd.distill(
        student=base.model,
        teacher=teacher.model,
        tokenizer=base.tokenizer,
        prompts=datasets.Dataset.from_list([{"problem": f"{i}+2"} for i in range(4)]),
        objective=oprd.HiddenMSE(tokens="all"),
        rollout=oprd.RolloutConfig(max_completion_length=16),
        output_dir=tmp_path / "run",
        max_steps=1,
        prompts_per_step=2,
        learning_rate=1e-3,
        warmup_ratio=0.0,
    )
    assert done.model is base.model
    assert not torch.equal(base.model.state_dict()["model.norm.weight"], before)


def test_a_teacher_of_another_shape_is_refused_naming_the_bridge(tmp_path, train_file):
    config = AutoConfig.from_pretrained(MODELS / "teacher").to_dict()
    Qwen3ForCausalLM(Qwen3Config(**config | {"num_hidden_layers": 2, "layer_types": None})).save_pretrained(
        tmp_path / "small"
    )
    load_miniature("teacher").tokenizer.save_pretrained(tmp_path / "small")
    tree = miniature_recipe(tmp_path / "run", train_file, teacher={"type": "local", "model": str(tmp_path / "small")})
    with pytest.raises(TeacherMismatch, match=r"4 blocks of width 128, teacher .* has 2 of width 128.*OPRD-Bridge"):
        build(parse_recipe(tree))
    build(parse_recipe(tree | {"objective": {"type": "opd"}}))


def test_another_vocabulary_is_refused_by_content_not_by_size(tmp_path):
    ours, theirs = load_miniature("base").tokenizer, load_miniature("teacher").tokenizer
    check_same_tokens(ours, theirs, "equal")
    theirs.add_tokens(["<|tool|>"])
    with pytest.raises(TeacherMismatch, match=r"another vocabulary: 1 entries differ, the first \('<\|tool\|>', 262\)"):
        check_same_tokens(ours, theirs, "other")


@pytest.mark.parametrize(("health_tokens", "kept"), [(0, False), (16, True)])
def test_an_untied_head_of_the_teacher_is_kept_only_when_something_reads_it(health_tokens, kept, tmp_path, train_file):
    lm = load_miniature("base")
    shape = {**lm.model.config.to_dict(), "tie_word_embeddings": False}
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(tmp_path / "untied")
    lm.tokenizer.save_pretrained(tmp_path / "untied")
    teacher = {"type": "local", "model": str(tmp_path / "untied"), "dtype": "float32"}
    run = build(
        parse_recipe(miniature_recipe(tmp_path / "run", train_file, teacher=teacher, health_tokens=health_tokens))
    )
    names = dict(run.teacher.lm.model.named_parameters())
    assert ("lm_head.weight" in names) == kept
    assert update_step(run, rollouts(run.lm), Clock(torch.device("cpu"))).finite
