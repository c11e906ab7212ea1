"""Files that survive a crash: written whole or appended line by line, and synced. YAML, read strictly."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from oprd.errors import ConfigError, RunFolderError

MOST_NODES = 10_000
"""Of the values of a YAML file, those that aliases stand for included."""
_TEXT = "tag:yaml.org,2002:str"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. When the block ends without an error it is synced and takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    yield aside
    _sync(aside)
    aside.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole: a reader sees the old file or the new one. Its folder is made if needed."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none if it is missing. A torn last line, from a crash or from a writer at work, is left out.

    Raises RunFolderError for any other line that is not JSON.
    """
    lines = path.read_bytes().rstrip().split(b"\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or not even UTF-8: a torn line may end inside a character
            if number < len(lines):
                raise RunFolderError(f"{path}:{number}: not JSON: {error}; the file is damaged") from error
    return rows


def sync_folder(folder: Path) -> None:
    """Make a folder's entries and the content of its files durable."""
    for path in (*filter(Path.is_file, folder.iterdir()), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text and 2026-11-25 as a date; a recipe means the number and the text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith("timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """The values, in which 1e-5 is a number, and the line of each dotted path. Raises ConfigError, which calls the text `name`."""
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, lines
        for where, line, node in _nodes(root):
            if where in lines:
                raise ConfigError(f"{name}, line {line}: {where} is given in line {lines[where]} already; drop one")
            if len(lines) >= MOST_NODES:
                raise ConfigError(f"{name} holds more than {MOST_NODES:,} values, those of its aliases included")
            if isinstance(node, yaml.ScalarNode) and (
                "\0" in node.value
                or node.tag not in {_TEXT, loader.resolve(yaml.ScalarNode, node.value, (True, False))}
            ):
                raise ConfigError(f"{name}, line {line}: {where} holds a NUL character or a tag, which no key takes")
            lines[where] = line
        return loader.construct_document(root), lines
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is nested too deeply, or holds an alias of itself") from error


def _nodes(node: yaml.Node, where: str = "", line: int = 1) -> Iterator[tuple[str, int, yaml.Node]]:
    """(dotted path, line from 1, node) of everything; what aliases stand for each time that they do."""
    yield where, line, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            path, line = f"{where}.{name}".lstrip("."), key.start_mark.line + 1
            yield f"key {path}", line, key
            yield from _nodes(value, path, line)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _nodes(value, f"{where}.{i}", value.start_mark.line + 1)
