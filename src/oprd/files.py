"""Files that survive a crash: written whole or appended line by line, and synced. YAML, read strictly."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from oprd.errors import ConfigError, DiskError, RunFolderError

MOST_NODES = 10_000
"""Of the values of a YAML file, those that aliases stand for included."""
_TEXT = "tag:yaml.org,2002:str"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskError for whatever keeps the block from writing `path`."""
    try:
        yield
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DiskError(
            f"cannot write {path}: {reason}. What was there before is intact; make room, then go on"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to. When the block ends without an error it is synced and takes the place of
    `path`; else it is deleted. Raises DiskError."""
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            delete(aside)
            yield aside
            if aside.is_dir():
                sync_folder(aside)
                delete(path)
            else:
                _sync(aside)
            aside.replace(path)
        except BaseException:
            delete(aside)
            raise


def delete(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; neither needs to be there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole: a reader sees the old file or the new one. Its folder is made if needed."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with writing(path), path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises RunFolderError if it is none."""
    return _object(path.read_bytes(), f"{path}")


def read_jsonl(path: Path, key: str | None = None) -> list[dict[str, Any]]:
    """All rows of a file; none if it is missing. A torn last line, from a crash or from a writer at work, is left out.

    Raises RunFolderError for any other line that is not a JSON object, or lacks `key`.
    """
    *lines, last = path.read_bytes().rstrip().split(b"\n") if path.is_file() else [b""]
    rows = [_object(line, f"{path}:{number}", key) for number, line in enumerate(lines, start=1)]
    with contextlib.suppress(RunFolderError):
        rows.append(_object(last, f"{path}", key))
    return rows


def _object(text: bytes, where: str, key: str | None = None) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:  # not JSON, or not even UTF-8: a torn line may end inside a character
        raise RunFolderError(f"{where}: not JSON: {error}; the file is damaged") from error
    if not isinstance(found, dict) or key not in {None, *found}:
        raise RunFolderError(f"{where}: not an object{f' with {key!r}' if key else ''}; the file is damaged")
    return found


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
