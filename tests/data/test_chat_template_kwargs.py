"""Variables of a chat template, for student, teachers, servers and benchmarks, each where it is asked for."""

import json
import shutil
from dataclasses import replace

import pytest

from conftest import MODELS, load_miniature
from oprd.data.chat import decode, render
from oprd.data.prompts import DataConfig, load_prompts
from oprd.errors import ConfigError, DataError
from oprd.evaluate.benchmarks import EvaluationConfig, load_benchmarks
from oprd.models.generate import generate
from oprd.models.loading import ModelFacts
from oprd.recipe import parse_recipe
from oprd.teacher import local
from oprd.teacher.base import GenerationRequest
from oprd.teacher.local import LocalTeacherConfig, SelfTeacherConfig
from oprd.teacher.server import ServerTeacherConfig
from oprd.types import Message
from serving import FaultyServer, connect, served, teacher_context

# as Qwen3's: a model that is not to think gets its reasoning block empty, with the prompt
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASKED, EMPTY = "<|user|>1+2<|end|><|assistant|>", "<think>\n\n</think>\n\n"
OFF = {"enable_thinking": False}


@pytest.fixture
def tokenizer():
    tokenizer = load_miniature("base").tokenizer
    tokenizer.chat_template = THINKING
    return tokenizer


@pytest.fixture
def thinking(tmp_path):
    """Folder of the miniature teacher with that template."""
    folder = tmp_path / "thinking"
    shutil.copytree(MODELS / "teacher", folder)
    (folder / "chat_template.jinja").write_text(THINKING)
    return str(folder)


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"problem": "1+2", "answer": "3", "completion": "3"}) + "\n")
    return str(path)


def test_the_student_reads_its_own_variables_and_its_given_completions_stand_behind_them(problem, tokenizer):
    for given, expected in ((None, ASKED), (OFF, ASKED + EMPTY), ({"enable_thinking": True}, ASKED)):
        data = DataConfig(prompts=problem, chat_template_kwargs=given)
        (prompt,) = load_prompts(data, tokenizer, context=256, room=16)
        assert (decode(tokenizer, prompt.token_ids, special=True), prompt.completion) == (expected, "3")


def test_a_benchmark_is_asked_as_the_student_is_trained_unless_it_says_otherwise(problem, tokenizer):
    for own, trained, expected in ((None, OFF, ASKED + EMPTY), ({}, OFF, ASKED), (OFF, None, ASKED + EMPTY)):
        config = EvaluationConfig(benchmarks=[problem], chat_template_kwargs=own, max_completion_length=16)
        data = DataConfig(prompts=problem, chat_template_kwargs=trained)
        (benchmark,) = load_benchmarks(config, tokenizer, context=256, trained_on=data)
        assert decode(tokenizer, benchmark.prompts[0].token_ids, special=True) == expected


def test_a_teacher_reads_its_own_variables_in_prompts_and_in_requests(problem, thinking, tmp_path, monkeypatch):
    context = replace(teacher_context(tmp_path), student=ModelFacts.read(thinking))
    tokenizer = context.student.tokenizer
    (prompt,) = load_prompts(DataConfig(prompts=problem), tokenizer, context=256, room=16)
    config = SelfTeacherConfig(chat_template_kwargs=OFF)
    (shown,) = config.render([prompt], config.facts(context), 16)
    assert decode(tokenizer, shown.teacher_token_ids, special=True) == ASKED + EMPTY
    assert decode(tokenizer, shown.token_ids, special=True) == ASKED
    with pytest.raises(ConfigError, match=r"give system_prompt or prompt_template, or chat_template_kwargs"):
        SelfTeacherConfig().facts(context)

    asked = []
    monkeypatch.setattr(local, "generate", lambda *args, **options: asked.extend(args[1]) or generate(*args, **options))
    config = LocalTeacherConfig(model=thinking, dtype="float32", chat_template_kwargs=OFF)
    teacher = config.build(config.facts(context), context)
    request = GenerationRequest(messages=prompt.messages, prefix="so", max_new_tokens=4, temperature=0)
    assert teacher.generate([[request]])[0][0] is not None
    assert [decode(tokenizer, ids, special=True) for ids in asked] == [f"{ASKED}{EMPTY}so"]


@pytest.mark.parametrize("continuation", ["completions", "continue_final_message"])
def test_a_server_gets_them_in_the_prompt_or_beside_the_messages(continuation, thinking, tmp_path):
    with FaultyServer() as server:
        server.lm.tokenizer.chat_template = THINKING
        options = {"continuation": continuation, "tokenizer": thinking, "chat_template_kwargs": OFF}
        teacher = connect(ServerTeacherConfig.model_validate(served(server.url, **options)), tmp_path)
        question = (Message(role="user", content="1+2"),)
        teacher.generate([[GenerationRequest(messages=question, max_new_tokens=2, temperature=0)]])
        (body,) = map(json.loads, server.generated)
    if continuation == "completions":
        assert body["prompt"] == ASKED + EMPTY
        assert "chat_template_kwargs" not in body
    else:
        assert body["chat_template_kwargs"] == OFF
        assert server.prompts == [ASKED + EMPTY]


def test_what_no_template_reads_and_what_the_program_sets_is_refused(problem, tokenizer):
    question = (Message(role="user", content="1+2"),)
    with pytest.raises(
        DataError, match=r"gives 'enable_thinkng', but the chat template does not read 'enable_thinkng'"
    ):
        render(tokenizer, question, {"enable_thinkng": False})
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"gives 'enable_thinking', but the chat template does not exist"):
        render(tokenizer, question, OFF)
    base = {"student": {"model": "s"}, "output_dir": "runs/x", "data": {"prompts": problem}}
    for name in ("tokenize", "add_generation_prompt", "tools", "messages", "chat_template"):
        teacher = {"type": "local", "model": "t", "chat_template_kwargs": {name: False}}
        with pytest.raises(ConfigError, match=f"teacher.chat_template_kwargs: '{name}' is set by the program"):
            parse_recipe(base | {"teacher": teacher})
