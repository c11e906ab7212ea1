"""Mutated input of every kind: it is read right, or refused by an OprdError that says where. `OPRD_FUZZ=4000` cases a test."""

import contextlib
import copy
import json
import os
import re
import resource
import shutil
import sys
from collections import Counter

import datasets
import psutil
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import MODELS, ROOT, load_miniature, miniature_recipe
from oprd.cli import main
from oprd.data import endless
from oprd.data.chat import render
from oprd.data.prompts import DataConfig, load_prompts
from oprd.errors import ConfigError, DataError, ModelError, OprdError
from oprd.files import read_yaml
from oprd.models.loading import ModelFacts, load_frozen
from oprd.recipe import load_recipe, parse_recipe, recipe_to_yaml
from oprd.types import Message

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("OPRD_FUZZ", "0"))
TALLY: Counter[str] = Counter()
"""Cases by test and outcome."""
TEXTS = [path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
TREES = [read_yaml(text, "recipe")[0] for text in TEXTS]
ODD = [
    "", " ", "\0", "\ud800", "\u2028", "\x85", "[/docs]", "[bold", "{x}", "{answer}", "..", "/", "~", "x" * 300, "1e999",
    "2026-11-25", "null", "yes", "é" * 5, "🙂", None, True, 0, -1, 1, 10**30, 10**400, 2**63, 1e308, -0.0, 1e-320,
    float("nan"), float("inf"), [], {}, [[]], [None], {"": {}}, {"type": "x"}, {"type": []}, [{"type": "oprd"}] * 3,
]  # fmt: skip
plain = st.integers(1, 9) | st.sampled_from([0.5, 1e-5, True, False, "x", "all", "last", "runs/[x]"])
odd = (
    st.sampled_from(ODD) | st.text(max_size=8) | st.integers() | st.floats() | st.lists(st.none() | st.text(max_size=3))
)


@pytest.fixture(scope="module", autouse=True)
def _tell():
    yield
    if CASES:
        # a traceback or a text that was changed in silence fails its test
        for kind in sorted({name.rsplit(" ", 1)[0] for name in TALLY}):
            refused, right = TALLY[f"{kind} refused"], TALLY[f"{kind} right"]
            print(f"\n{kind}: {refused + right} tried, {refused} refused, {right} right", end="")


def cases(fewer: int):
    """Seeded examples: `fewer` of them, or as many as the environment asks for."""
    return settings(
        max_examples=CASES or fewer,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def refused(kind: str, error: OprdError, *named: object) -> None:
    """Count a refusal; it has to be short, and to name what it is about."""
    assert 0 < len(str(error)) < 6000, str(error)[:2000]
    for name in named:
        assert str(name) in str(error), (name, str(error))
    TALLY[f"{kind} refused"] += 1


def mutate(data, tree):
    """`tree` with one to three values replaced, dropped, doubled, or put under another key."""
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(places_in(tree))
        if not places:
            break
        parent, key = data.draw(st.sampled_from(places))
        how = data.draw(st.sampled_from(["replace", "replace", "drop", "rename", "wrap"]))
        if how == "replace":
            parent[key] = copy.deepcopy(data.draw(plain | odd))
        elif how == "wrap":
            parent[key] = data.draw(st.sampled_from([[parent[key]], {"type": parent[key]}, str(parent[key])]))
        elif isinstance(parent, dict):
            value = parent.pop(key)
            if how == "rename":
                parent[data.draw(st.text(max_size=6) | st.integers() | st.sampled_from(["type", "weight", key]))] = (
                    value
                )
        else:
            del parent[key]
    return tree


def places_in(tree):
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places_in(value)


def check_recipe(kind, read):
    try:
        recipe = read()
    except ConfigError as error:
        refused(kind, error)
    else:
        assert parse_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
        TALLY[f"{kind} right"] += 1


@cases(300)
@given(st.data())
def test_a_recipe_of_odd_values_is_refused_or_reads_back_as_itself(data):
    tree = mutate(data, data.draw(st.sampled_from(TREES)))
    check_recipe("recipe tree", lambda: parse_recipe(tree))


@cases(150)
@given(st.data())
def test_a_recipe_of_odd_text_is_refused_or_reads_back_as_itself(tmp_path_factory, data):
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 3))):
        at, cut = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        odd_yaml = [
            "!!int x",
            "&a [*a]",
            "*a",
            "<<: *a",
            "? ",
            "- ",
            "\t",
            "!!binary x",
            "!!timestamp x",
            "%TAG",
            "---",
            "0x" + "f" * 4000,
        ]
        text = text[:at] + data.draw(st.sampled_from(odd_yaml) | st.text(max_size=5)) + text[at + cut :]
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    encoding = data.draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "latin-1", "utf-8-sig"]))
    path.write_bytes(text.encode(encoding, errors="replace"))
    check_recipe("recipe text", lambda: load_recipe(path))


@cases(150)
@given(st.data())
def test_an_odd_override_is_refused_or_reads_back_as_itself(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "plain.yaml"
    path.write_text(data.draw(st.sampled_from(TEXTS)))
    keys = ["seed", "rollout.group_size", "objective", "objective.0.weight", "data", "a.b", "", ".", "student.model.x"]
    key = data.draw(st.sampled_from(keys) | st.text(max_size=6))
    value = data.draw(
        st.integers(1, 9).map(str)
        | st.text(max_size=8)
        | st.sampled_from(["[", "{a: ", "!!int x", "&a [*a]", "*a", "2026-13-45"])
    )
    check_recipe("override", lambda: load_recipe(path, [data.draw(st.sampled_from([f"{key}={value}", key]))]))


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "r.yaml"
    path.write_text("\n".join(lines) + "\n" + TEXTS[0])
    with pytest.raises(ConfigError, match="more than 10,000 values, those of its aliases included"):
        load_recipe(path)


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["oprd", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0), capsys.readouterr().err


def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("max_steps: 8\nmax_steps: 7\n")
    with pytest.raises(ConfigError, match=r"line 2: key max_steps is given in line 1 already"):
        load_recipe(path)


def test_an_override_changes_one_place_of_what_an_alias_shares(tmp_path):
    tree = miniature_recipe("run", "d.jsonl")
    del tree["rollout"], tree["student"], tree["teacher"]
    path = tmp_path / "r.yaml"
    shared = "student: &model {model: s}\nteacher: {type: several, teachers: {a: {<<: *model, type: local}}}\n"
    path.write_text(yaml.safe_dump(tree) + shared)
    recipe = load_recipe(path, ["student.model=other"])
    assert (recipe.student.model, recipe.teacher.members["a"].model) == ("other", "s")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("eval", MODELS / "base", "{data}", "top_p=0"), 2),
        (("eval", MODELS / "base", "{data}", "sampling_temperature=.nan"), 2),
        (("eval", MODELS / "base", "{data}", "seed=-1"), 2),
        (("eval", MODELS / "base", "{data}", f"seed={10**30}"), 2),
        (("eval", MODELS / "base", "{data}[/docs]"), 2),
        (("eval", MODELS / "base", ""), 2),
        (("eval", MODELS / "base", "/"), 2),
        (("eval", MODELS / "base", "x" * 300), 2),
        (("eval", "[/docs]", "{data}"), 2),
        (("report", "{folder}", "--out", "{folder}"), 2),
        (("report", "/proc"), 2),
        (("report", "x" * 300), 3),
        (("show-config", "{folder}"), 2),
        (("train", "{data}"), 2),
        (("train", "x\ud800"), 2),
        (("fit-bridge", "{data}[/]"), 2),
        (("demo", "--seed", "-1"), 2),
        (("demo", "--out", "{data}"), 3),
    ],
    ids=lambda value: (
        " ".join(map(str, value))[-40:].encode("ascii", "replace").decode() if isinstance(value, tuple) else None
    ),
)
def test_odd_options_end_with_a_message_and_write_nothing(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    filled = [str(a).replace("{data}", str(tmp_path / "d.jsonl")).replace("{folder}", str(tmp_path)) for a in arguments]
    got, err = command(monkeypatch, capsys, *filled)
    assert got == code, err
    assert err.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


SPECIAL = [
    "\u2028",
    "\u2029",
    "\x85",
    "\r",
    "\ufeff",
    "\\ud800",
    "\\u0000",
    "{",
    "}",
    "[",
    ",",
    ":",
    '"',
    "9" * 5000,
    "NaN",
    "1e999",
    "null",
    "true",
]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "007", 1e5, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    ["problem", "prompt", "question", "messages", "completion", "answer", "teacher", "tools", "x.y"]
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_miniature("base").tokenizer


def rows_of(path):
    """The objects of a JSONL file, read by the simplest means."""
    sys.set_int_max_str_digits(0)
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [json.loads(line.decode("utf-8-sig")) for line in lines if line.strip(b" \t\r\xef\xbb\xbf")]


def check_data(kind, path, tokenizer, expected=None):
    """Read as prompts, or refused by the name of the file."""
    try:
        prompts = load_prompts(DataConfig(prompts=str(path)), tokenizer, context=512, room=64)
    except DataError as error:
        return refused(kind, error, path)
    assert prompts
    for prompt in prompts:
        assert prompt.token_ids
        repr(prompt.answer).encode()
        json.dumps([turn.content for turn in prompt.messages] + [prompt.answer], ensure_ascii=False).encode()
    if path.suffix == ".jsonl":
        assert len(prompts) == len(rows_of(path))
        for prompt, row in zip(prompts, rows_of(path), strict=True):
            given = row.get("messages") if row.get("messages") is not None else row.get("prompt")
            if isinstance(given, list):
                turns = [turn["content"] for turn in given]
                assert [turn.content for turn in prompt.messages] == turns[: len(prompt.messages)]
            else:
                (turn,) = prompt.messages
                texts = (row.get(name) for name in ("prompt", "problem", "question"))
                assert turn.content == next(text for text in texts if text is not None)
    if expected is not None:
        assert [prompt.messages[-1].content for prompt in prompts] == expected
    TALLY[f"{kind} right"] += 1
    return None


@cases(100)
@given(st.data())
def test_a_dataset_of_odd_rows_is_read_or_refused(tmp_path_factory, tokenizer, data):
    path = tmp_path_factory.getbasetemp() / "d.jsonl"
    rows = data.draw(st.lists(st.dictionaries(names, values, max_size=4), max_size=3))
    rows = [data.draw(st.sampled_from([row, {"problem": "1+1"} | row, row | {"problem": "1+1"}])) for row in rows]
    lines = [json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in rows]
    if data.draw(st.integers(0, 2)) == 0 and lines:
        i, new = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.sampled_from(SPECIAL))
        at = data.draw(st.integers(0, len(lines[i])))
        lines[i] = lines[i][:at] + new + lines[i][at:]
    text = data.draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)
    encoding = data.draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1"]))
    path.write_bytes(
        text.encode(
            encoding,
            errors=data.draw(st.sampled_from(["replace", "surrogatepass"])) if encoding != "latin-1" else "replace",
        )
    )
    check_data("dataset jsonl", path, tokenizer)


@cases(60)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), st.sampled_from(["jsonl", "csv", "parquet"]))
def test_every_character_of_a_text_is_kept(tmp_path_factory, tokenizer, texts, kind):
    path = tmp_path_factory.getbasetemp() / f"kept.{kind}"
    texts = [f"{text}\u2028?" for text in texts if not {"\0", "\r"} & {*text}] or ["a\u2028b\x85c"]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    frame = datasets.Dataset.from_dict({"problem": texts}).to_pandas()
    if kind == "jsonl":
        path.write_text(
            "".join(json.dumps({"problem": text}, ensure_ascii=False) + "\n" for text in texts), newline="\n"
        )
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    check_data(f"texts {kind}", path, tokenizer, expected=texts)


@cases(60)
@given(st.binary(max_size=60), st.sampled_from(["csv", "parquet", "jsonl"]), st.integers(0, 10**6), st.booleans())
def test_broken_files_are_read_or_refused(tmp_path_factory, tokenizer, junk, kind, at, cut):
    path = tmp_path_factory.getbasetemp() / f"broken.{kind}"
    frame = datasets.Dataset.from_dict({"problem": ["1+1", 'say "x", y'], "answer": ["2", "007"]}).to_pandas()
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    if kind == "jsonl":
        path.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "2+2"}\n')
    whole = path.read_bytes()
    at %= len(whole) + 1
    path.write_bytes(whole[:at] + junk + (b"" if cut else whole[at + len(junk) :]))
    check_data(f"broken {kind}", path, tokenizer)


def test_rows_that_no_parser_takes_are_refused_with_their_line(tmp_path, tokenizer):
    for line, reason in (
        ('{"problem": "1+1", "x": ' + "[" * 30_000 + "]" * 30_000 + "}", "nested too deeply"),
        ('{"problem": "\\ud800"}', "half of a surrogate pair"),
        ('{"problem": 5}', "must be non-empty text, got '5'"),
        ('{"problem": "1+1", "answer": {"a": 1}}', "an answer must be text, a number or a list of these"),
    ):
        (tmp_path / "d.jsonl").write_text('{"problem": "1+1"}\n\n' + line + "\n")
        with pytest.raises(DataError, match=f"d.jsonl:3: .*{reason}"):
            load_prompts(DataConfig(prompts=str(tmp_path / "d.jsonl")), tokenizer, context=512, room=64)


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
SMALL = (
    st.integers(-2, 9) | st.sampled_from(["x", None, True, [], {}, [1], "\ud800", 0.5, -1e308]) | st.text(max_size=4)
)
"""Values that ask for no model of gigabytes."""
CODE = [
    "{{ 1/0 }}", "{{ messages[9].x.y }}", "{{ 'x' + 1 }}", "{% for", "{{ 2.0 ** 9999 }}", "{{ raise_exception('no') }}",
    "{{ range(10**9) }}", "{{ x() }}", "{{ messages | tojson | tojson }}", "}}", "\0", "{{ ''.__class__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{{ '%d' % 'x' }}", "{{ none[0] }}",
]  # fmt: skip


def use_folder(folder):
    """What a run does with a folder: its facts, prompts in its template, its weights, checked."""
    facts = ModelFacts.read(str(folder))
    turns = [Message(role="system", content="s"), Message(role="user", content="1+1")]
    assert all(0 <= i < facts.vocabulary for i in render(facts.tokenizer, turns))
    load_frozen(str(folder), facts.tokenizer, torch.device("cpu"), dtype=torch.float32)


@cases(60)
@given(st.data())
def test_a_model_folder_with_a_broken_file_is_used_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODELS / "base", folder)
    path = folder / data.draw(st.sampled_from([*FILES, "config.json", "model.safetensors"]))
    how = data.draw(st.sampled_from(["edit", "edit", "bytes", "cut", "remove"]))
    if how == "edit" and path.suffix == ".json":
        tree = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            parent, key = data.draw(st.sampled_from(list(places_in(tree))))
            parent[key] = copy.deepcopy(data.draw(SMALL))
        path.write_text(json.dumps(tree))
    elif how == "edit" and path.suffix == ".jinja":
        text = path.read_text()
        at = data.draw(st.integers(0, len(text)))
        path.write_text(text[:at] + data.draw(st.sampled_from(CODE)) + text[at + data.draw(st.integers(0, 9)) :])
    elif how == "remove":
        path.unlink()
    else:
        whole = path.read_bytes()
        at = data.draw(st.integers(0, min(len(whole), 2000)))
        junk = b"" if how == "cut" else data.draw(st.binary(min_size=1, max_size=8))
        path.write_bytes(whole[:at] + junk + (b"" if how == "cut" else whole[at + len(junk) :]))
    try:
        use_folder(folder)
    except (ModelError, DataError) as error:
        refused(f"folder {path.name}", error, *([folder] if isinstance(error, ModelError) else []))
    else:
        TALLY[f"folder {path.name} right"] += 1


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000, at most 4,096 are built"),
        ("config.json", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000, at most 4,096"),
        ("config.json", {"hidden_size": 10**9}, "hidden_size is 1,000,000,000, at most 16,777,216 are built"),
        ("config.json", {"intermediate_size": 10**12}, "intermediate_size is 1,000,000,000,000, at most 16,777,216"),
        ("config.json", {"vocab_size": 2**40}, "vocab_size is 1,099,511,627,776, at most 16,777,216 are built"),
        ("chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "come to an end"),
        ("chat_template.jinja", "{{ 'x' * 9999999999 }}", "does not come to an end on a prompt of one word"),
        ("chat_template.jinja", "{{ 9 ** (9 ** 9) }}", "does not come to an end on a prompt of one word"),
        ("chat_template.jinja", "{{ 'x' | center(9999999999) }}", "does not come to an end on a prompt of one word"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict | str) else None,
)  # fmt: skip
def test_an_absurd_model_folder_is_refused_in_bounded_memory_and_time(file, change, said, tmp_path, monkeypatch):
    monkeypatch.setattr(endless, "MOST_SECONDS", 1)
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "base", folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if isinstance(change, dict) else change)
    with limited(2 << 30), pytest.raises(ModelError, match=re.escape(said)):
        ModelFacts.read(str(folder))


@contextlib.contextmanager
def limited(more: int):
    """Memory that this process may take beyond what it has."""
    before, own = resource.getrlimit(resource.RLIMIT_DATA), psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (own + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
