"""Recipes: what is accepted, and what the user is told about what is not."""

from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from oprd.errors import ConfigError
from oprd.objectives import OPD, OPRD, OPDTopK
from oprd.recipe import GONE, load_recipe, parse_recipe, recipe_to_yaml
from oprd.section import WeightSchedule
from oprd.types import TokenSelection

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BASE = {
    "student": {"model": "s"},
    "teacher": {"type": "local", "model": "t"},
    "data": {"prompts": "p.jsonl"},
    "output_dir": "runs/x",
}
BRIDGE = {"type": "oprd_bridge", "bridge": "b.safetensors"}
SERVER = {"type": "server", "base_url": "http://localhost:8000/v1", "model": "m", "continuation": "prefill"}
REWRITE = {"source": {"type": "rewrite"}}


def refusal(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(BASE | changes)
    return str(caught.value)


def test_defaults_are_the_papers_setting():
    recipe = parse_recipe(BASE)
    paper = OPRD(layers="all", tokens=TokenSelection(keep="last", k=2000), normalization="none", weight=1.0)
    assert recipe.objective == (paper,)
    assert (recipe.rollout.group_size, recipe.prompts_per_step, recipe.max_steps) == (2, 8, 500)
    assert (recipe.learning_rate, recipe.warmup_ratio, recipe.lr_scheduler_type) == (1e-5, 0.03, "cosine")
    assert parse_recipe(BASE | {"extrapolation": {}}).extrapolation.factors == (2, 4, 6, 8, 10)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read_and_reads_back_as_itself(path):
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


def test_text_with_any_end_of_line_reads_back_as_itself():
    for text in ("a\x85b", "a\u2028b", "\u2029", "a\nb", "a\rb", "é\x85", "\ufeff", "\x7f", "🙂"):
        recipe = parse_recipe(BASE | {"data": {"prompts": "p.jsonl", "prompt_template": text}})
        assert parse_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe, repr(text)
    assert "é" in recipe_to_yaml(parse_recipe(BASE | {"data": {"prompts": "é.jsonl"}}))


def test_a_key_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE) + "10:05.08: x\n")
    for _ in range(5):
        with pytest.raises(ConfigError, match=r"605\.08"):
            load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_files_of_this_repository_that_exist(path):
    text = path.read_text()
    named = [word.strip("`,;:().'\"") for word in text.split()]
    of_ours = [
        word for word in named if word.startswith(("recipes/", "docs/", "scripts/", "tests/", "benchmarks/", "src/"))
    ]
    assert [word for word in of_ours if not (ROOT / word.split("#")[0]).exists()] == []


def test_a_second_stage_starts_from_the_student_of_the_first():
    first, second = (
        load_recipe(ROOT / "recipes" / name) for name in ("oprd_bridge_published.yaml", "opd_after_bridge.yaml")
    )
    assert Path(second.student.model) == Path(first.output_dir) / "student"
    assert second.teacher == first.teacher


def test_a_resolved_recipe_reads_back_as_itself():
    objective = [
        {"type": "opd_top_k", "weight": {"from": 1.0, "to": 0.0, "steps": 5}},
        {"type": "oprd", "layers": [1, 3], "tokens": {"first": 7}},
    ]
    recipe = parse_recipe(BASE | {"objective": objective, "report_to": ["tensorboard"], "rollout": REWRITE})
    assert parse_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
    assert recipe.objective == (
        OPDTopK(weight=WeightSchedule.model_validate({"from": 1.0, "to": 0.0, "steps": 5})),
        OPRD(layers=(1, 3), tokens=TokenSelection(keep="first", k=7)),
    )


def test_a_number_written_as_1e_5_is_a_number(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE) + "learning_rate: 1e-5\n")
    assert load_recipe(tmp_path / "r.yaml").learning_rate == 1e-5


def test_an_unknown_key_is_refused_with_the_nearest_name():
    assert "lerning_rate: unknown key (did you mean 'learning_rate'?)" in refusal(lerning_rate=1e-4)


def test_an_unknown_key_deep_inside_names_its_path_and_what_is_allowed():
    message = refusal(objective=[{"type": "opd"}, {"type": "oprd", "layer": "all"}])
    assert message.startswith("objective.1.layer: unknown key (did you mean 'layers'?); allowed: weight, tokens")


def test_an_error_names_the_line_of_the_file_unless_an_override_made_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE) + "rollout:\n  group_size: two\n")
    line = path.read_text().splitlines().index("  group_size: two") + 1
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:{line}: rollout.group_size: should be a valid integer, got 'two'"
    with pytest.raises(ConfigError, match=r"^rollout\.group_size: should be a valid integer, got 'three'"):
        load_recipe(path, ["rollout.group_size=three"])


def test_a_wrong_type_is_refused_and_not_converted():
    assert refusal(max_steps="ten") == "max_steps: should be a valid integer, got 'ten'"
    assert "max_steps" in refusal(max_steps=True)
    assert "bf16: should be a valid boolean, got 'yes'" in refusal(bf16="yes")
    assert "learning_rate: should be a finite number" in refusal(learning_rate=float("inf"))


def test_an_unknown_variant_lists_the_known_ones():
    message = refusal(objective={"type": "oprdd"})
    assert message.startswith("objective.type: unknown type 'oprdd' (did you mean 'oprd'?); allowed: 'oprd', ")
    assert all(f"'{name}'" in message for name in ("opd", "opd_top_k", "opd_sampled", "oprd_bridge", "omni_opd", "nll"))


def test_a_missing_variant_or_key_says_so():
    assert "key 'type' is required" in refusal(objective={"layers": "all"})
    assert refusal(student={}) == "student.model: this key is required"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": []}, "objective: Value should have at least 1 item"),
        (
            {"objective": {"type": "oprd", "tokens": "last_k"}},
            "objective.tokens: tokens must be `all`, `{first: k}` or",
        ),
        ({"objective": {"type": "oprd", "tokens": {"last": 0}}}, "with a positive number of tokens k"),
        ({"objective": {"type": "oprd", "layers": [1, 1]}}, "layers must name each block once"),
        ({"objective": {"type": "opd_sampled", "kl_temperature": 2.0}}, "objective.kl_temperature: unknown key"),
        ({"objective": {"type": "opd", "weight": {"from": 0, "to": 0, "steps": 3}}}, "0 from beginning to end"),
        ({"objective": BRIDGE | {"loss": "reverse_kl", "layers": "all"}}, "got layers 'all'. Set layers=last"),
        ({"objective": BRIDGE | {"type": "oprd_bridge_published", "loss": "hidden"}}, "objective.loss: unknown key"),
        ({"objective": [{"type": "omni_opd"}, {"type": "omni_opd"}]}, "use one objective 'omni_opd' in a recipe"),
        ({"objective": {"type": "omni_opd", "tokens": {"last": 5}}}, "`tokens: all` or the `first` k"),
        ({"teacher": {"type": "several", "teachers": {}}}, "teacher.teachers: Dictionary should have at least 1 item"),
        ({"teacher": SERVER | {"base_url": "localhost:8000"}}, "base_url must look like http://host:port/v1"),
        ({"teacher": SERVER | {"continuation": "completions"}}, "give `tokenizer`"),
        ({"teacher": SERVER | {"max_cost": 1.0}}, "max_cost needs price_per_million: [prompt, completion]"),
        ({"extrapolation": {"factors": [3, 2]}}, "extrapolation.factors must rise"),
        ({"extrapolation": {"accept": "paired", "validation_prompts": 3}}, "nothing is ever accepted"),
        ({"rollout": {"length_schedule": {"from": 2000, "steps": 9}}}, "max_completion_length is 1024; start between"),
        ({"rollout": {"source": {"type": "rewrite", "prompt": "Rewrite."}}}, "must contain {completion}"),
    ],
)
def test_a_senseless_value_or_combination_is_refused_with_the_reason(changes, reason):
    assert reason in refusal(**changes)


def test_a_length_schedule_that_leaves_nothing_to_learn_on_is_refused():
    rollout = REWRITE | {"max_completion_length": 64, "length_schedule": {"from": 8, "steps": 9}}
    assert "objective 'nll' learns on rewrites alone; drop length_schedule" in refusal(
        objective={"type": "nll"}, rollout=rollout
    )
    parse_recipe(BASE | {"objective": [{"type": "opd"}, {"type": "nll"}], "rollout": rollout})


@pytest.mark.parametrize("key", GONE)
def test_a_key_of_an_earlier_version_names_its_replacement(key):
    assert f"{key}: unknown key of an earlier version: {GONE[key]}" in refusal(**{key: 1})


@pytest.mark.parametrize(
    ("changes", "where", "key"),
    [
        ({"objective": {"type": "mixture", "terms": []}}, "objective.type: unknown type 'mixture'", "mixture"),
        ({"objective": {"type": "opd", "estimator": "sampled"}}, "objective.estimator: unknown key", "estimator"),
        ({"objective": {"type": "oprd", "coefficient": 2.0}}, "objective.coefficient: unknown key", "coefficient"),
        ({"objective": BRIDGE | {"space": "projections"}}, "objective.space: unknown key", "space"),
        ({"objective": BRIDGE | {"fit": {"method": "gradient"}}}, "objective.fit: unknown key", "fit"),
        ({"objective": {"type": "omni_opd", "audit": "random"}}, "objective.audit: unknown key", "audit"),
        ({"teacher": {"type": "rewrite", "teacher": {}}}, "teacher.type: unknown type 'rewrite'", "rewrite"),
        ({"teacher": {"type": "sequence", "teacher": {}}}, "teacher.type: unknown type 'sequence'", "sequence"),
        ({"teacher": SERVER | {"request_timeout_s": 9.0}}, "teacher.request_timeout_s: unknown", "request_timeout_s"),
        ({"rollout": {"lambda_on_policy": 0.5}}, "rollout.lambda_on_policy: unknown key", "lambda_on_policy"),
        ({"extrapolation": {"triggers": "settled"}}, "extrapolation.triggers: unknown key", "triggers"),
        ({"student": {"model": "s", "gguf_file": "x"}}, "student.gguf_file: unknown key", "gguf_file"),
    ],
)
def test_what_an_earlier_version_had_deep_inside_names_its_place_and_its_replacement(changes, where, key):
    message = refusal(**changes)
    assert where in message
    assert f"of an earlier version: {GONE[key]}" in message


def test_overrides_reach_inside_and_are_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE))
    recipe = load_recipe(path, ["objective={type: opd_top_k, k: 4}", "rollout.group_size=4", "learning_rate=1e-4"])
    assert recipe.objective == (OPDTopK(k=4),)
    assert (recipe.rollout.group_size, recipe.learning_rate) == (4, 1e-4)
    several = load_recipe(path, ["objective=[{type: opd}, {type: oprd, weight: 10}]"])
    assert several.objective == (OPD(), OPRD(weight=10))
    with pytest.raises(ConfigError, match="must look like key=value"):
        load_recipe(path, ["learning_rate"])
    with pytest.raises(ConfigError, match="output_dir is a value, not a section"):
        load_recipe(path, ["output_dir.x=1"])
    with pytest.raises(ConfigError, match="the value is not YAML"):
        load_recipe(path, ["learning_rate=[1"])


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.yaml")
    for name, content, reason in (
        ("bad.yaml", b"a: [1", "is not YAML"),
        ("list.yaml", b"- 1", "must be a mapping"),
        ("latin.yaml", "a: é".encode("latin-1"), "is not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            load_recipe(tmp_path / name)
