"""Teachers in this process see their own prompt; completions are compared position by position."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

import oprd
from conftest import MODELS, load_miniature, miniature_recipe
from oprd.clock import Clock
from oprd.data.batching import collate
from oprd.data.chat import render
from oprd.errors import DataError, TeacherMismatch
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts, tokenizer_difference
from oprd.recipe import parse_recipe
from oprd.teacher import LocalTeacherConfig
from oprd.teacher.base import GenerationRequest, TeacherFacts
from oprd.teacher.local import LOCAL, LocalTeacher
from oprd.train.run import run_recipe
from oprd.train.setup import setup
from oprd.types import ALL_TOKENS, HiddenSpec, Message, Prompt, Rollouts, Taps

CPU = torch.device("cpu")
SPEC = HiddenSpec(block=4, at="token", tokens=ALL_TOKENS)
TAPS = Taps(hidden=(SPEC,))
SELF = {"type": "self", "prompt_template": "{problem}="}


def rollouts(lm: LanguageModel, teacher: str | None = None) -> Rollouts:
    turns = [(Message(role="user", content=text),) for text in ("12+34-5", "1+2")]
    prompts = tuple(
        Prompt(
            row=i, messages=messages, token_ids=render(lm.tokenizer, messages), teacher=teacher,
            teacher_messages=messages, teacher_token_ids=render(lm.tokenizer, messages),
            columns={"problem": messages[0].content, "solution": "41"},
        )
        for i, messages in enumerate(turns)
    )  # fmt: skip
    ids = tuple(tuple(lm.tokenizer(text)["input_ids"]) for text in ["12+34=46", "3"])
    return Rollouts(prompts=prompts, completion_ids=ids, finished=(True, True))


def states(teacher, given: Rollouts) -> torch.Tensor:
    return teacher.targets(given, TAPS).teacher.hidden[SPEC]


def facts(context: int = 256) -> TeacherFacts:
    model = replace(ModelFacts.read(str(MODELS / "teacher")), context=context)
    return TeacherFacts(provides=LOCAL, why_not={}, model=model)


def test_a_teacher_with_another_prompt_reads_the_same_completions_behind_it(teacher_lm):
    given = rollouts(teacher_lm)
    config = LocalTeacherConfig(model="m", system_prompt="Be right.", prompt_template="{problem} is {solution}")
    given = replace(given, prompts=tuple(config.render(given.prompts, facts(), 0)))
    got = states(LocalTeacher(FrozenModel(teacher_lm), context=256), given)
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
    assert not states(LocalTeacher(FrozenModel(teacher_lm), context=256), rollouts(teacher_lm)).requires_grad


def test_a_template_column_that_is_missing_and_a_prompt_too_long_are_refused_before_training(teacher_lm):
    prompt = rollouts(teacher_lm).prompts[0]
    with pytest.raises(DataError, match=r"asks for \{proof\}, the dataset has problem, solution"):
        LocalTeacherConfig(model="m", prompt_template="{proof}").render([prompt], facts(), 0)
    with pytest.raises(
        DataError, match=r"row 0: the teacher's prompt has \d+ tokens, its context of 64 is to hold 60 more"
    ):
        LocalTeacherConfig(model="m").render([prompt], facts(context=64), 60)


def test_a_request_that_leaves_no_room_for_its_answer_is_not_answered(teacher_lm):
    question = GenerationRequest(
        messages=(Message(role="user", content="12+34-5"),), max_new_tokens=20, temperature=1.0, samples=2
    )
    teacher = LocalTeacher(FrozenModel(teacher_lm), context=40)
    ((answer, begun, lost),) = teacher.generate(
        [[question, replace(question, prefix="12+34=46\n"), replace(question, max_new_tokens=40)]]
    )
    assert len(answer.texts) == len(begun.texts) == 2
    assert answer.texts[0].startswith("12+34=")
    assert begun.texts[0].startswith("46-5=")
    assert lost is None
    assert teacher.generate([[question]]) == teacher.generate([[question]])


def test_a_full_weight_self_teacher_is_a_frozen_copy_of_the_initial_student(tmp_path, train_file):
    method = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, teacher=SELF))).method
    lm = method.student.lm
    before = states(method.teacher, rollouts(lm))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(states(method.teacher, rollouts(lm)), before)


def test_a_lora_self_teacher_is_the_student_before_training(tmp_path, train_file):
    student = {"model": str(MODELS / "base"), "lora": {"r": 4}}
    method = setup(parse_recipe(miniature_recipe(tmp_path / "run", train_file, teacher=SELF, student=student))).method
    lm = method.student.lm
    before = states(method.teacher, rollouts(lm))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(states(method.teacher, rollouts(lm)), before)
    batch = collate([[1, 2]], [[3, 4]], pad_id=0, device=CPU)
    changed = method.student.hidden(batch, TAPS).hidden[SPEC]
    start = FrozenModel(load_miniature("base")).hidden(batch, TAPS).hidden[SPEC]
    assert float((changed - start).abs().max()) > 0.1


def test_each_prompt_is_answered_by_the_teacher_it_names(tmp_path):
    data = tmp_path / "d.jsonl"
    names = ["good", "bad", "good", "bad"]
    data.write_text("".join(json.dumps({"problem": f"{i}+2", "teacher": n}) + "\n" for i, n in enumerate(names)))
    teachers = {
        "good": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        "bad": {"type": "local", "model": str(MODELS / "base"), "dtype": "float32"},
    }
    tree = miniature_recipe(tmp_path / "run", data, teacher={"type": "several", "teachers": teachers}, max_steps=1)
    teacher = setup(parse_recipe(tree)).method.teacher
    for name in ("good", "bad"):
        lm = load_miniature("teacher" if name == "good" else "base")
        one = rollouts(lm, teacher=name)
        assert_close(states(teacher, one), states(LocalTeacher(FrozenModel(lm), context=256), one))
    run_recipe(parse_recipe(tree))
    data.write_text(json.dumps({"problem": "1+2", "teacher": "other"}) + "\n")
    with pytest.raises(DataError, match="column 'teacher' is 'other', allowed: good, bad"):
        setup(parse_recipe(tree | {"output_dir": str(tmp_path / "second")}))


def test_what_a_teacher_of_another_tokenizer_cannot_hold_is_not_supervised_and_counted(tmp_path, capfd):
    """`+34+56+78` has 6 tokens of the student, a token for two digits, and 9 of the teacher, of which 6 fit."""
    data = tmp_path / "one.jsonl"
    data.write_text('{"problem": "1+2"}\n')
    lm = load_miniature("base")
    prompt = len(render(lm.tokenizer, (Message(role="user", content="1+2"),)))
    weights, values, metrics = [], [], []
    for context in (256, prompt + 6):
        lm.core.config.max_position_embeddings = context
        for part in (lm.model, lm.tokenizer):
            part.save_pretrained(tmp_path / f"teacher {context}")
        teacher = {"type": "local", "model": str(tmp_path / f"teacher {context}"), "dtype": "float32"}
        changes = {"student": {"model": str(MODELS / "wide_teacher")}, "objective": {"type": "opd_sampled"}}
        tree = miniature_recipe(tmp_path / f"run {context}", data, teacher=teacher, **changes)
        parts = setup(parse_recipe(tree | {"rollout": {"max_completion_length": 6}}))
        method, (objective,) = parts.method, parts.method.student.objectives
        tokenizer = method.student.lm.tokenizer
        ids = (*tokenizer("+34+56+78")["input_ids"], tokenizer.eos_token_id)
        given = Rollouts(prompts=(parts.prompts[0],), completion_ids=(ids,), finished=(True,))
        annotated = method.annotate(method.annotate(given))
        losses = method.student.losses(method.batch(annotated), method.targets(annotated))
        weights.append(objective.weights(annotated).tolist())
        values.append(losses[0].detach())
        metrics.append({metric.name: metric.sum for metric in method.teacher.metrics()})
    assert weights == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]
    assert_close(values[1][:4], values[0][:4])
    assert metrics[0] == {"teacher/aligned/share": 7, "teacher/beyond_context/sum": 0}
    assert metrics[1] == {"teacher/aligned/share": 4, "teacher/beyond_context/sum": 1}
    assert capfd.readouterr().err.count("1 of 1 completions are longer in the tokens of teacher") == 1


def test_models_and_datasets_can_be_objects(tmp_path):
    base, teacher = load_miniature("base"), load_miniature("teacher")
    before = base.model.state_dict()["model.norm.weight"].clone()
    done = oprd.distill(
        student=base.model,
        teacher=teacher.model,
        given=oprd.Given(tokenizer=base.tokenizer),
        prompts=datasets.Dataset.from_list([{"problem": f"{i}+2"} for i in range(4)]),
        objective=oprd.OPRD(tokens="all"),
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
    small = Qwen3ForCausalLM(Qwen3Config(**config | {"num_hidden_layers": 2, "layer_types": None}))
    small.save_pretrained(tmp_path / "small")
    load_miniature("teacher").tokenizer.save_pretrained(tmp_path / "small")
    tree = miniature_recipe(tmp_path / "run", train_file, teacher={"type": "local", "model": str(tmp_path / "small")})
    with pytest.raises(TeacherMismatch, match=r"4 blocks of width 128, teacher .* has 2 of width 128.*'oprd_bridge'"):
        setup(parse_recipe(tree))
    setup(parse_recipe(tree | {"objective": {"type": "opd"}}))


def test_another_vocabulary_is_refused_by_content_not_by_size(tmp_path, train_file):
    ours, theirs = load_miniature("base").tokenizer, load_miniature("teacher").tokenizer
    assert tokenizer_difference(ours, theirs) is None
    theirs.add_tokens(["<|tool|>"])
    assert tokenizer_difference(ours, theirs) == "another vocabulary: 1 entries differ, the first ('<|tool|>', 262)"
    load_miniature("teacher").model.save_pretrained(tmp_path / "other")
    theirs.save_pretrained(tmp_path / "other")
    tree = miniature_recipe(tmp_path / "run", train_file, teacher={"type": "local", "model": str(tmp_path / "other")})
    with pytest.raises(TeacherMismatch, match=r"needs the student's tokenizer \(teacher .* has another vocabulary: 1 "):
        setup(parse_recipe(tree))


@pytest.mark.parametrize(("health_tokens", "kept"), [(0, False), (16, True)])
def test_an_untied_head_of_the_teacher_is_kept_only_when_something_reads_it(health_tokens, kept, tmp_path, train_file):
    lm = load_miniature("base")
    shape = {**lm.model.config.to_dict(), "tie_word_embeddings": False}
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(tmp_path / "untied")
    lm.tokenizer.save_pretrained(tmp_path / "untied")
    teacher = {"type": "local", "model": str(tmp_path / "untied"), "dtype": "float32"}
    tree = miniature_recipe(tmp_path / "run", train_file, teacher=teacher, health_tokens=health_tokens)
    method = setup(parse_recipe(tree)).method
    assert isinstance(method.teacher, LocalTeacher)
    assert ("lm_head.weight" in dict(method.teacher.model.lm.model.named_parameters())) == kept
    assert method.update(rollouts(method.student.lm), 1, Clock(CPU)).finite
