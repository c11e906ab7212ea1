"""Weights that change over the run: `weight: {from: 1, to: 0, steps: 10}` on a term of the sum."""

import pytest
import yaml

from conftest import miniature_recipe
from oprd.errors import ConfigError
from oprd.objectives import OPD
from oprd.recipe import parse_recipe, recipe_to_dict, recipe_to_yaml
from oprd.section import WeightSchedule
from oprd.train.run import run_recipe
from train.runs import assert_same_weights, largest_difference, metrics, weights_after

pytestmark = pytest.mark.slow

FADING = {"from": 1, "to": 0, "steps": 10}
OPRD = {"type": "oprd", "tokens": "all"}
OPD_TERM = {"type": "opd"}


@pytest.mark.parametrize(
    ("start", "to", "values"),
    [
        (1.0, 0.0, {1: 1.0, 4: 2 / 3, 10: 0.0, 11: 0.0, 50: 0.0}),
        (0.0, 3.0, {1: 0.0, 4: 1.0, 10: 3.0, 50: 3.0}),
        (2.0, 1.0, {1: 2.0, 7: 4 / 3, 10: 1.0, 50: 1.0}),
    ],
)
def test_weights_by_hand(start, to, values):
    objective = OPD(weight=WeightSchedule(start=start, to=to, steps=10))
    for step, weight in values.items():
        assert objective.weight_at(step) == pytest.approx(weight, abs=1e-15)
    assert OPD(weight=0.5).weight_at(50) == 0.5


def test_the_recipe_reads_and_writes_the_schedule(tmp_path, train_file):
    recipe = parse_recipe(miniature_recipe(tmp_path, train_file, objective=[OPRD | {"weight": FADING}, OPD_TERM]))
    assert recipe.objective[0].weight == WeightSchedule(start=1.0, to=0.0, steps=10)
    assert parse_recipe(recipe_to_dict(recipe)) == recipe
    assert yaml.safe_load(recipe_to_yaml(recipe))["objective"][0]["weight"] == FADING


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (FADING | {"steps": 1}, r"objective\.weight\.steps: should be greater than 1, got 1"),
        (
            {"from": 0, "to": 0, "steps": 10},
            r"objective\.weight: a weight that is 0 from beginning to end: drop the obj",
        ),
        (FADING | {"to": -1}, r"objective\.weight\.to: should be greater than or equal to 0, got -1"),
        ({"from": 1, "to": 0}, r"objective\.weight\.steps: this key is required"),
        (
            FADING | {"step": 3},
            r"objective\.weight\.step: unknown key \(did you mean 'steps'\?\); allowed: from, ",
        ),
        (0, r"objective\.weight: should be greater than 0, got 0"),
        ("much", r"objective\.weight: should be .*number.*, got 'much'"),
    ],
)
def test_a_senseless_weight_is_refused_in_one_line(weight, message, tmp_path, train_file):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parse_recipe(miniature_recipe(tmp_path, train_file, objective=OPRD | {"weight": weight}))
    assert "\n" not in str(caught.value)


def test_the_loss_of_a_step_is_the_sum_at_its_weights(tmp_path, train_file):
    terms = [OPRD | {"weight": {"from": 2, "to": 0, "steps": 3}}, OPD_TERM | {"weight": 0.5}]
    run_recipe(parse_recipe(miniature_recipe(tmp_path / "run", train_file, objective=terms, health_tokens=0)))
    rows = metrics(tmp_path / "run")
    assert all(row["train/oprd/mean"] > 1e-3 < row["train/reverse_kl/mean"] for row in rows)
    for row, weight in zip(rows, (2.0, 1.0, 0.0, 0.0), strict=True):
        expected = weight * row["train/oprd/mean"] + 0.5 * row["train/reverse_kl/mean"]
        assert row["train/loss/mean"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "weight"), [(1, 1.0), (4, 2 / 3)])
def test_the_gradient_has_the_weight_of_the_step(step, weight, tmp_path, train_file):
    def after(weight: object) -> dict:
        terms = [OPRD | {"weight": weight}, OPD_TERM]
        return weights_after(tmp_path, train_file, (step, step), objective=terms, adam_epsilon=1e-4)

    assert_same_weights(after(FADING), after(weight))


@pytest.mark.parametrize(("step", "fading", "other"), [(10, OPRD, OPD_TERM), (50, OPD_TERM, OPRD)])
def test_a_term_whose_weight_has_become_0_changes_nothing(step, fading, other, tmp_path, train_file):
    def after(step: int, *terms: dict) -> dict:
        return weights_after(tmp_path, train_file, (step, step), objective=list(terms))

    fading = fading | {"weight": FADING}
    alone = after(step, other)
    assert_same_weights(after(step, other, fading), alone)
    assert largest_difference(after(1, other, fading), alone) > 1e-4
