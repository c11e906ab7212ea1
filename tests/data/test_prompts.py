"""Prompts from files, their order, chat templates and stop tokens."""

import json

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from conftest import load_miniature
from oprd.data.chat import decode, end_of_turn, fill, render, stop_ids, with_prompt
from oprd.data.prompts import DataConfig, Prompts, PromptSampler, load_prompts
from oprd.errors import DataError
from oprd.types import Message


@pytest.fixture(scope="module")
def tokenizer():
    return load_miniature("base").tokenizer


def load(path, tokenizer, **options):
    return load_prompts(DataConfig(prompts=str(path), **options), tokenizer, context=256, room=64)


def test_jsonl_csv_and_parquet_give_the_same_prompts(tmp_path, tokenizer):
    rows = [{"problem": "1+2", "answer": "3"}, {"problem": "4-5", "answer": "-1"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_csv(tmp_path / "d.csv")
    dataset.to_parquet(tmp_path / "d.parquet")
    expected = load(tmp_path / "d.jsonl", tokenizer)
    assert [p.messages[0].content for p in expected] == ["1+2", "4-5"]
    assert load(tmp_path / "d.parquet", tokenizer) == expected
    assert [(p.token_ids, p.answer) for p in load(tmp_path / "d.csv", tokenizer)] == [
        (p.token_ids, p.answer) for p in expected
    ]


def test_the_answer_may_stand_in_a_column_of_another_name_or_a_nested_one(tmp_path, tokenizer):
    file = tmp_path / "nested.jsonl"
    file.write_text(json.dumps({"problem": "1+2", "reward_model": {"ground_truth": 3}, "gold.answer": "4"}) + "\n")
    for column, answer in (("reward_model.ground_truth", "3"), ("gold.answer", "4")):
        (prompt,) = load_prompts(DataConfig(prompts=str(file), answer=column), tokenizer, context=256, room=16)
        assert prompt.answer == answer
    with pytest.raises(
        DataError, match=r"nested.jsonl:1: data.answer is 'problem.text', but what should hold 'text' is '1\+2'"
    ):
        load_prompts(DataConfig(prompts=str(file), answer="problem.text"), tokenizer, context=256, room=16)
    with pytest.raises(DataError, match=r"data.answer is 'reward_model.truth', which no row of .*nested.jsonl has"):
        load_prompts(DataConfig(prompts=str(file), answer="reward_model.truth"), tokenizer, context=256, room=16)


def test_a_conversation_that_ends_with_the_assistant_gives_the_completion(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (prompt,) = load(tmp_path / "d.jsonl", tokenizer, system_prompt="Add.")
    assert [turn.content for turn in prompt.messages] == ["Add.", "1+2"]
    assert prompt.completion == "3"
    assert tokenizer.decode(prompt.token_ids) == "<|system|>Add.<|end|><|user|>1+2<|end|><|assistant|>"


def test_templates_fill_columns_and_leave_other_braces_alone():
    assert fill(r"{problem} in \boxed{}, {1}", {"problem": "2+2"}) == r"2+2 in \boxed{}, {1}"
    with pytest.raises(DataError, match=r"asks for \{proof\}, the dataset has problem"):
        fill("{proof}", {"problem": "x"})


def test_the_reference_answer_is_shown_to_a_teacher_alone(tmp_path, tokenizer):
    template = r"{problem} Put it in \boxed{answer}."
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "1+2", "answer": "3", "style": "brief"}) + "\n")
    (prompt,) = load(tmp_path / "d.jsonl", tokenizer, prompt_template=template, system_prompt="Be {style}.")
    assert [turn.content for turn in prompt.messages] == ["Be brief.", r"1+2 Put it in \boxed{answer}."]
    assert fill(template, prompt.columns) == r"1+2 Put it in \boxed{3}."
    with pytest.raises(DataError, match=r"prompt_template asks for \{answer\}, the dataset has problem, style to show"):
        load(tmp_path / "d.jsonl", tokenizer, prompt_template="{problem} It is {answer}.")


USER, ASKED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi", "tools": [{"name": "add"}]}, "column 'tools' would be left out"),
        ({"messages": [USER, ASKED | {"tool_calls": [{"id": 1}]}, USER]}, "a message has 'tool_calls'"),
        ({"prompt": [USER], "completion": [ASKED, USER, ASKED]}, "must be one assistant message, has 3 messages"),
        ({"prompt": [USER], "completion": [USER]}, "must be one assistant message, has 1 messages"),
        ({"prompt": [USER, ASKED], "completion": "yo"}, "ends with the assistant, and there is a column 'completion'"),
        ({"messages": [ASKED, USER]}, "refuses a conversation of the roles assistant, user: start with the user"),
    ],
)
def test_what_a_conversation_would_lose_is_refused_by_name(row, reason, tmp_path):
    tokenizer = load_miniature("base").tokenizer
    check = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
    tokenizer.chat_template = check + tokenizer.chat_template
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"d.jsonl:1: .*{reason}"):
        load(tmp_path / "d.jsonl", tokenizer)


def test_a_new_system_prompt_replaces_the_old_one():
    turns = (Message(role="system", content="old"), Message(role="user", content="hi"))
    assert [t.content for t in with_prompt(turns, {}, "new", None)] == ["new", "hi"]
    assert with_prompt(turns, {}, None, None) == turns


def test_without_a_chat_template_the_text_is_read_as_it_is():
    tokenizer = load_miniature("base").tokenizer
    tokenizer.chat_template = None
    assert tokenizer.decode(render(tokenizer, [Message(role="user", content="1+2")])) == "1+2"


@pytest.mark.parametrize(
    ("turn", "asked"),
    [
        ("<|{{ m.role }}|>{{ m.content }}<|end|>", "<|user|>1+2<|end|><|assistant|>"),
        ("{{ m.role }}: {{ m.content }}\n", "user: 1+2\nassistant:"),
        ("{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}", "[INST] 1+2 [/INST]"),
        ("{% if m.role == 'user' %}{{ m.content }}={% else %}{{ raise_exception('no') }}{% endif %}", "1+2="),
    ],
    ids=["tokens", "text", "space alone", "no answers"],
)  # fmt: skip
def test_a_template_without_a_generation_prompt_asks_as_it_writes_an_answer(turn, asked, base):
    base.tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    ids = render(base.tokenizer, (Message(role="user", content="1+2"),))
    assert decode(base.tokenizer, ids, special=True) == asked


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    tokenizer = load_miniature("base").tokenizer
    tokenizer.chat_template = None
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert tokenizer("1+2")["input_ids"][-1] == end[1]
    assert render(tokenizer, (Message(role="user", content="1+2"),)) == tuple(tokenizer("1+2")["input_ids"][:-1])


def test_stop_tokens_come_from_the_generation_config_the_tokenizer_and_the_template(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_ids(tokenizer, None) == (end,)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[3, 7])) == tuple(sorted((3, 7, end)))
    # a tokenizer whose end of text is not what its template ends a turn with, as many chat models have it
    other = load_miniature("base").tokenizer
    other.eos_token = "<|pad|>"
    assert stop_ids(other, None) == tuple(sorted((other.pad_token_id, end)))
    assert end_of_turn(other, stop_ids(other, None)) == end


def test_an_epoch_uses_every_prompt_once_and_ranks_share_the_step(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"problem": f"{i}+1"}) + "\n" for i in range(12)))
    prompts = load(tmp_path / "d.jsonl", tokenizer)

    def rows(step: int, rank: int = 0, world: int = 1, seed: int = 0) -> list[int]:
        sampler = PromptSampler(prompts, per_step=4, seed=seed, rank=rank, world_size=world)
        return [prompt.row for prompt in sampler.batch(step)]

    first = rows(0) + rows(1) + rows(2)
    second = rows(3) + rows(4) + rows(5)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert rows(0) == rows(0)
    assert rows(0) != rows(0, seed=1)
    assert sorted(rows(1, 0, 2) + rows(1, 1, 2)) == sorted(rows(1))


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("spelling", "answer"),
    [
        ("1e5", "1e5"), ("0.00025", "0.00025"), ("0.10", "0.10"), ('"007"', "007"), ("true", "true"), ("null", None), ("NaN", None),
        ("9" * 5000, "9" * 5000), ('["3", 5]', "3, 5"), ("[42]", "42"), ("[]", None), ("12345678901234567", "12345678901234567"),
    ],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_an_answer_keeps_its_spelling(spelling, answer, tmp_path, tokenizer):
    (prompt,) = load(write_rows(tmp_path / "d.jsonl", [f'{{"problem": "1+2", "answer": {spelling}}}']), tokenizer)
    assert prompt.answer == answer


def test_answers_of_csv_and_parquet_keep_their_spelling(tmp_path, tokenizer):
    (tmp_path / "d.csv").write_text("problem,answer,other\n1+2,007,x\n2+2,1e5,\n3+3,,NA\n", encoding="utf-8-sig")
    prompts = load(tmp_path / "d.csv", tokenizer)
    assert [p.answer for p in prompts] == ["007", "1e5", None]
    assert prompts[2].columns["other"] == "NA"
    rows = [{"problem": "1+2", "answer": value} for value in (1e-5, 1e23, 42.0, float("nan"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    assert [p.answer for p in load(tmp_path / "d.parquet", tokenizer)] == ["0.00001", "1" + "0" * 23, "42", None]


def test_prompts_that_do_not_fit_are_dropped_and_counted_where_asked(tmp_path, tokenizer):
    path = write_rows(tmp_path / "d.jsonl", [{"problem": text} for text in ("1+1", "1+" * 200 + "1", "2+2")])
    with pytest.raises(DataError, match=r"d.jsonl:2: the prompt has 404 tokens"):
        load(path, tokenizer)
    prompts = Prompts(DataConfig(prompts=str(path), drop_overlong=True), tokenizer, context=256, room=64)
    assert [(p.row, p.messages[0].content) for p in prompts] == [(0, "1+1"), (2, "2+2")]
    assert prompts.notes == [f"{path}: 1 of 3 prompts leave no room for a completion and are dropped"]


def test_equal_prompts_are_used_once_where_asked(tmp_path, tokenizer):
    rows = [{"problem": text, "id": i} for i, text in enumerate(("1+1", "2+2", "1+1", "1+1", "3+3"))]
    path = write_rows(tmp_path / "d.jsonl", rows)
    prompts = Prompts(DataConfig(prompts=str(path), deduplicate=True), tokenizer, context=256, room=64)
    assert [p.row for p in prompts] == [0, 1, 4]
    assert prompts.notes == [f"{path}: 3 different prompts in 5 rows"]
    assert len(load(path, tokenizer)) == 5


def test_only_the_rows_in_use_are_read_and_any_change_of_the_file_is_noticed(tmp_path, tokenizer):
    good = [{"problem": f"{i}+1"} for i in range(3000)]
    path = write_rows(tmp_path / "d.jsonl", [*good[:-1], "not json"])
    prompts = Prompts(DataConfig(prompts=str(path)), tokenizer, context=256, room=64)
    assert [p.row for p in prompts.prepare([7, 3])] == [3, 7]
    with pytest.raises(DataError, match=r"d.jsonl:3000: not JSON"):
        prompts[2999]
    digests = set()
    for changed in (good, [*good[:-1], {"problem": "2"}], good[:-1]):
        write_rows(path, changed)
        digests.add(Prompts(DataConfig(prompts=str(path)), tokenizer, context=256, room=64).digest(seed=0))
    assert len(digests) == 3


def test_a_template_that_reads_a_list_of_parts_gets_one(base):
    base.tokenizer.chat_template = "{% for m in messages %}{% for part in m['content'] %}<|{{ m.role }}|>{{ part['text'] }}{% endfor %}{% endfor %}"
    assert decode(base.tokenizer, render(base.tokenizer, (Message(role="user", content="1+2"),)), special=True) == (
        "<|user|>1+2<|assistant|>"
    )


def test_text_with_a_token_that_the_embedding_has_no_row_for_is_refused_by_its_line(tmp_path):
    tokenizer = load_miniature("base").tokenizer
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|extra|>"])
    reason = rf"'<\|extra\|>' in the text is token {rows}, but the model's embedding has {rows} rows"
    texts = [{"problem": "1+1"}, {"problem": "1+<|extra|>"}]
    for row in (texts[1], {"problem": "1+1", "completion": "<|extra|>"}, {"problem": "1+1", "answer": "<|extra|>"}):
        path = write_rows(tmp_path / "d.jsonl", [texts[0], row])
        config = DataConfig(prompts=str(path))
        if "answer" in row:  # no model reads it
            assert len(load_prompts(config, tokenizer, context=256, room=64, vocabulary=rows)) == 2
            continue
        with pytest.raises(DataError, match=f"d.jsonl:2: {reason}"):
            load_prompts(config, tokenizer, context=256, room=64, vocabulary=rows)
        assert len(load_prompts(config, tokenizer, context=256, room=64, vocabulary=rows + 1)) == 2


def test_prompts_of_a_batch_are_those_of_one_by_one_and_the_first_bad_row_is_named(tmp_path, tokenizer):
    rows = [{"problem": f"{i}+1" * (1 + i % 7)} for i in range(600)]
    path = write_rows(tmp_path / "d.jsonl", rows)
    config = DataConfig(prompts=str(path))
    together, single = (Prompts(config, tokenizer, context=256, room=64) for _ in range(2))
    assert together.prepare() == tuple(single[i] for i in range(600))
    for i in (300, 299, 511):
        rows[i] = {"problem": "1" * 500}
    rows[400] = {"problem": 5}
    write_rows(path, rows)
    with pytest.raises(DataError, match=r"d.jsonl:300: the prompt has 503 tokens"):
        Prompts(config, tokenizer, context=256, room=64).prepare()
    with pytest.raises(DataError, match=r"d.jsonl:401: column 'problem' must be non-empty text"):
        Prompts(config.model_copy(update={"drop_overlong": True}), tokenizer, context=256, room=64)
    del rows[400]
    write_rows(path, rows)
    kept = Prompts(config.model_copy(update={"drop_overlong": True}), tokenizer, context=256, room=64)
    assert len(kept) == 596
    assert [p.row for p in kept.prepare()] == [i for i in range(599) if i not in {299, 300, 510}]
