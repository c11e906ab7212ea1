"""From YAML and overrides to a recipe and back, with errors that say what is allowed."""

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from oprd.config.recipe import Recipe
from oprd.errors import ConfigError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides, whose values are YAML.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest name) or a wrong type.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} must be a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from nested mappings, as YAML gives them. Raises ConfigError naming key, value and what is allowed."""
    try:
        # Through JSON because pydantic's strict mode then takes mappings for classes and lists for tuples, yet no "3" for 3.
        return TypeAdapter(Recipe).validate_json(json.dumps(_floats(tree)))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(line, tree) for line in error.errors()))) from None


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested mappings that `parse_recipe` reads back to an equal recipe."""
    return part_to_dict(recipe)


def part_to_dict(part: Any) -> Any:
    """A recipe, one of its sections, or a plain value, as YAML has it."""
    return TypeAdapter(type(part)).dump_python(part, mode="json") if dataclasses.is_dataclass(part) else part


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, every default spelled out."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _floats(tree: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; a recipe means the number."""
    if isinstance(tree, Mapping):
        return {key: _floats(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_floats(value) for value in tree]
    if isinstance(tree, str) and tree[:1] in "0123456789.+-" and "e" in tree.lower():
        try:
            return float(tree)
        except ValueError:
            return tree
    return tree


def _explain(line: Any, tree: Mapping[str, Any]) -> str:
    """One pydantic error as: where, what was given, what is allowed."""
    where, kind, given = _path(line["loc"], tree), line["type"], line["input"]
    if kind == "value_error":
        return f"{where}: {line['ctx']['error']}" if where else str(line["ctx"]["error"])
    if kind == "missing":
        return f"{where}: this key is required"
    if kind == "union_tag_not_found":
        return f"{where}: key 'type' is required and says which variant is meant, got {given!r}"
    if kind == "union_tag_invalid":
        tags = line["ctx"]["expected_tags"]
        return f"{where}.type: unknown type {line['ctx']['tag']!r}{_nearest(line['ctx']['tag'], tags)}; allowed: {tags}"
    if kind == "unexpected_keyword_argument":
        allowed = ", ".join(_fields_at(line["loc"][:-1]))
        return f"{where}: unknown key{_nearest(str(line['loc'][-1]), allowed)}; allowed: {allowed}"
    return f"{where}: {line['msg'].replace('Input should', 'should').replace('valid array', 'list')}, got {given!r}"


def _nearest(given: str, allowed: str) -> str:
    names = [name.strip(" '") for name in allowed.split(",")]
    close = difflib.get_close_matches(given, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _path(loc: Sequence[str | int], tree: Any) -> str:
    """pydantic's location without what is not in the recipe, such as the names of union variants: `objective.terms.1.k`."""
    parts = []
    for depth, key in enumerate(loc):
        if (isinstance(tree, Mapping) and key in tree) or (isinstance(key, int) and isinstance(tree, list)):
            tree = cast(Any, tree)[key]
        elif isinstance(tree, Mapping) and depth == len(loc) - 1 and key in _fields_at(loc[:-1]):
            pass  # a missing key
        else:
            continue
        parts.append(str(key))
    return ".".join(parts)


def _fields_at(loc: Sequence[str | int]) -> list[str]:
    """Names of the keys allowed at a location of the recipe."""
    found: list[type] = [Recipe]
    for key in loc:
        tagged = [cls for cls in found if _tag(cls) == key]
        if tagged:
            found = tagged
            continue
        hints = [typing.get_type_hints(cls, include_extras=True) for cls in found]
        inner = [cls for hint in hints if key in hint for cls in _dataclasses_in(hint[key])]
        found = inner or found
    return [f.name for f in dataclasses.fields(found[0])]


def _tag(cls: type) -> object:
    return next((f.default for f in dataclasses.fields(cls) if f.name == "type"), None)


def _dataclasses_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    return [cls for argument in typing.get_args(annotation) for cls in _dataclasses_in(argument)]
