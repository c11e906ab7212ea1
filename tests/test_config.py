"""Recipes: what is accepted, and what the user is told about what is not."""

import pytest
import yaml

from oprd.config.objectives import HiddenMSEConfig, MixtureConfig, OutputKLConfig
from oprd.config.reading import load_recipe, parse_recipe, recipe_to_yaml
from oprd.errors import ConfigError

BASE = {
    "student": {"model": "s"},
    "teacher": {"type": "local", "model": "t"},
    "data": {"prompts": "p.jsonl"},
    "output_dir": "runs/x",
}


BRIDGE = {"type": "oprd_bridge", "bridge": "b.safetensors"}


def told(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(BASE | changes)
    return str(caught.value)


def test_defaults_are_the_papers_setting():
    recipe = parse_recipe(BASE)
    assert recipe.objective == HiddenMSEConfig(layers="all", tokens="last_k", normalization="none", coefficient=1.0)
    assert (recipe.rollout.group_size, recipe.prompts_per_step, recipe.max_steps) == (2, 8, 500)
    assert (recipe.learning_rate, recipe.warmup_ratio, recipe.lr_scheduler_type) == (1e-5, 0.03, "cosine")


def test_a_resolved_recipe_reads_back_as_itself():
    objective = {
        "type": "mixture",
        "terms": [{"type": "opd", "estimator": "top_k"}, {"type": "oprd", "layers": [1, 3]}],
    }
    recipe = parse_recipe(BASE | {"objective": objective, "report_to": ["tensorboard"]})
    assert parse_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe
    assert isinstance(recipe.objective, MixtureConfig)
    assert recipe.objective.terms[1] == HiddenMSEConfig(layers=(1, 3))


def test_a_number_written_as_1e_5_is_a_number():
    assert parse_recipe(BASE | {"learning_rate": "1e-5"}).learning_rate == 1e-5


def test_an_unknown_key_is_refused_with_the_nearest_name():
    assert "lerning_rate: unknown key (did you mean 'learning_rate'?)" in told(lerning_rate=1e-4)


def test_an_unknown_key_deep_inside_names_its_path_and_what_is_allowed():
    message = told(objective={"type": "mixture", "terms": [{"type": "opd"}, {"type": "oprd", "layer": "all"}]})
    assert message.startswith("objective.terms.1.layer: unknown key (did you mean 'layers'?); allowed: type, layers")


def test_a_wrong_type_is_refused_and_not_converted():
    assert told(max_steps="ten") == "max_steps: should be a valid integer, got 'ten'"
    assert "max_steps" in told(max_steps=True)
    assert "bf16: should be a valid boolean, got 'yes'" in told(bf16="yes")


def test_an_unknown_variant_lists_the_known_ones():
    message = told(objective={"type": "oprdd"})
    assert (
        message == "objective.type: unknown type 'oprdd' (did you mean 'oprd'?); "
        "allowed: 'oprd', 'opd', 'oprd_bridge', 'omni_opd', 'nll', 'mixture'"
    )


def test_a_missing_variant_or_key_says_so():
    assert "key 'type' is required" in told(objective={"layers": "all"})
    assert told(student={}) == "student.model: this key is required"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": {"type": "oprd", "tokens": "all", "k": 5}}, "k=5 has no meaning with tokens='all'"),
        ({"objective": {"type": "oprd", "layers": [1, 1]}}, "layers must name each block once"),
        ({"objective": {"type": "opd", "jsd_weight": 0.3}}, "jsd_weight has no meaning"),
        ({"objective": {"type": "opd", "top_k": 3}}, "top_k and support have no meaning"),
        ({"objective": {"type": "opd", "estimator": "sampled", "kl_temperature": 2.0}}, "only at kl_temperature 1"),
        ({"objective": {"type": "mixture", "terms": [{"type": "opd"}]}}, "at least two terms"),
        ({"objective": BRIDGE | {"trainable": True}}, "with space 'student' nothing is projected"),
        ({"objective": BRIDGE | {"loss": "reverse_kl", "layers": "all"}}, "got space 'student' and layers 'all'"),
        ({"objective": BRIDGE | {"loss": "reverse_kl", "space": "projections"}}, "got space 'projections'"),
        ({"teacher": {"type": "self"}}, "agrees with the student everywhere"),
        ({"teacher": {"type": "several", "teachers": {}}}, "teachers is empty"),
    ],
)
def test_a_senseless_combination_is_refused_with_the_reason(changes, reason):
    assert reason in told(**changes)


@pytest.mark.parametrize("key", ["sampling_temperature", "top_p", "lambda_on_policy"])
def test_the_sampled_estimator_refuses_tokens_that_are_not_samples_of_the_student(key):
    message = told(objective={"type": "opd", "estimator": "sampled"}, rollout={key: 0.5})
    assert f"rollout.{key} is 0.5" in message
    parse_recipe(BASE | {"objective": {"type": "opd"}, "rollout": {key: 0.5}})


def test_overrides_reach_inside_and_are_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE))
    recipe = load_recipe(
        path, ["objective={type: opd, estimator: top_k}", "rollout.group_size=4", "learning_rate=1e-4"]
    )
    assert recipe.objective == OutputKLConfig(estimator="top_k")
    assert (recipe.rollout.group_size, recipe.learning_rate) == (4, 1e-4)
    with pytest.raises(ConfigError, match="must look like key=value"):
        load_recipe(path, ["learning_rate"])
    with pytest.raises(ConfigError, match="output_dir is a value, not a section"):
        load_recipe(path, ["output_dir.x=1"])


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_recipe(tmp_path / "list.yaml")
