"""The reference page of a recipe, made from the classes: `python scripts/make_recipe_docs.py`.

Writes docs/recipe.md. With `--check` it writes nothing and fails if the page is not current.
"""

import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pages import DOCS, write_or_check
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from oprd.recipe import Recipe
from oprd.section import Section
from oprd.types import TokenSelection

HEAD = """# Recipe reference

Every key of a recipe, by section. `python scripts/make_recipe_docs.py` makes this page from the classes behind
`oprd.Recipe`: edit their docstrings, not this page. `oprd show-config RECIPE` prints a recipe with every default spelled
out, `oprd schema` prints the JSON schema for editors. An override on the command line is `key.path=value`, and its value is
YAML: `oprd train RECIPE rollout.group_size=4 objective='{type: oprd, tokens: {last: 500}}'`.
"""
PLAIN = {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
Places = Mapping[type[Section], str]
"""Heading of each section on the page."""


def main(arguments: Sequence[str]) -> int:
    if bare := undescribed():
        print(f"without a description: {', '.join(bare)}", file=sys.stderr)
    return write_or_check(DOCS / "recipe.md", make_page(), arguments)


def make_page() -> str:
    """The whole page, as Markdown."""
    places = dict(_walk(Recipe, "", set()))
    return "\n".join([HEAD, *(block for section in places for block in _blocks(section, places))])


def undescribed() -> list[str]:
    """Class and key of every field without a description."""
    return [
        f"{section.__name__}.{_key(name, field)}"
        for section, _ in _walk(Recipe, "", set())
        for name, field in section.model_fields.items()
        if not _is_tag(name, field) and not _description(section, name)
    ]


def _walk(section: type[Section], path: str, seen: set[type[Section]]) -> Iterator[tuple[type[Section], str]]:
    """(section, heading) in the order of the page; a section that several keys share is listed at the first."""
    seen.add(section)
    tag = section.model_fields.get("type")
    yield section, path if tag is None else f"{path}: {{type: {tag.default}}}"
    for name, field in section.model_fields.items():
        for inner in _sections(field.annotation):
            if inner not in seen:
                yield from _walk(inner, f"{path}.{_key(name, field)}".lstrip("."), seen)


def _blocks(section: type[Section], places: Places) -> Iterator[str]:
    """Heading, docstring, table, and the default texts that are too long for it."""
    if heading := places[section]:
        yield f"{'#' * (2 + heading.partition(':')[0].count('.'))} `{heading}`\n"
    yield f"{_one_line(section.__doc__)}\n"
    fields = {name: field for name, field in section.model_fields.items() if not _is_tag(name, field)}
    if fields:
        rows = [_row(section, name, field, places) for name, field in fields.items()]
        yield "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows]) + "\n"
    for name, field in fields.items():
        if _is_long(field.default):
            yield f"Default of `{name}`:\n\n```text\n{field.default}\n```\n"


def _row(section: type[Section], name: str, field: FieldInfo, places: Places) -> str:
    type_ = _type(field.annotation, field.metadata, places)
    cells = (f"`{_key(name, field)}`", type_, _default(field), _description(section, name))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _key(name: str, field: FieldInfo) -> str:
    return field.alias or name


def _is_tag(name: str, field: FieldInfo) -> bool:
    """Whether the field is the `type` that tells the variants of a union apart; it stands in the heading."""
    return name == "type" and typing.get_origin(field.annotation) is Literal


def _description(section: type[Section], name: str) -> str:
    """The field's docstring, or that of the field it overrides, or that of the one section it holds."""
    for parent in section.__mro__:
        if issubclass(parent, Section) and name in parent.model_fields and parent.model_fields[name].description:
            return _one_line(parent.model_fields[name].description)
    inner = list(_sections(section.model_fields[name].annotation))
    return _one_line((inner[0].__doc__ or "").split("\n\n")[0]) if len(inner) == 1 else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _is_long(default: Any) -> bool:
    return isinstance(default, str) and "\n" in default


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], dict):  # the default objective
        (value,) = value
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if _is_long(value):
        return "below"
    if isinstance(value, Section):
        tag = getattr(value, "type", None)
        return "its defaults" if tag is None else f"`{{type: {tag}}}`"
    if isinstance(value, TokenSelection):
        return "`all`" if value.keep == "all" else f"`{{{value.keep}: {value.k}}}`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {x}' for key, x in value.items())}}}`"
    return f"`{value if isinstance(value, str) else json.dumps(value).replace('e-0', 'e-')}`"


def _type(annotation: Any, metadata: Sequence[Any], places: Places) -> str:
    """A type in the words of YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], arguments[1:], places)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(x, (), places) for x in arguments if x is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{x}`" for x in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0], (), places)}"
    if origin is dict:
        return f"mapping from names to {_type(arguments[1], (), places)}"
    if annotation is TokenSelection:
        return "`all`, `{first: k}`, `{last: k}`"
    if annotation in places:
        tag = annotation.model_fields.get("type")
        label = "section" if tag is None else f"`{tag.default}`"
        return f"[{label}](#{re.sub(r'[^a-z0-9_ -]', '', places[annotation]).replace(' ', '-')})"
    return f"{PLAIN[annotation]}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    parts = [part for item in metadata for part in (getattr(item, "metadata", None) or [item])]
    found = [
        f"{sign} {getattr(part, name):g}" for part in parts for name, sign in BOUNDS.items() if hasattr(part, name)
    ]
    return f" {' and '.join(found)}" if found else ""


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections in an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
