"""Files that survive a crash: written whole or appended line by line, and synced. YAML, read strictly."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from oprd.errors import ConfigError, DiskError, RunFolderError

SUMS = "SHA256SUMS"
"""Holds `checksums`, for `sha256sum -c` too."""
MOST_NODES = 10_000
"""Of the values of a YAML file, those that aliases stand for included."""
_TEXT = "tag:yaml.org,2002:str"
_CHECKSUM = "crc32"
"""Last key of a JSON line or file: the CRC-32 of what stands before it, which a flipped bit changes."""


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
    """Append one JSON line with its checksum."""
    with writing(path), path.open("a", encoding="utf-8") as lines:
        lines.write(_with_checksum(row))


def write_json(path: Path, row: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole."""
    write_atomically(path, _with_checksum(row, indent=2))


def read_json(path: Path, remedy: str = "restore it from a copy") -> dict[str, Any]:
    """What `write_json` wrote. Raises RunFolderError if it is damaged or missing."""
    found = parse_json(path.read_bytes()) if path.is_file() else None
    if found is None:
        raise RunFolderError(f"{path} is damaged, missing, or of another version of oprd; {remedy}")
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """`iterate_jsonl` as a list."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `append_jsonl` wrote; none if the file is missing. A torn last line, from a crash or from a writer at
    work, is left out. Raises RunFolderError for any other damaged line."""
    if path.is_file():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if (row := parse_json(line)) is not None:
                    yield row
                elif line.endswith(b"\n"):
                    raise RunFolderError(
                        f"{path}:{number} is damaged, or of another version of oprd; restore it, or delete the line"
                    )


def parse_json(text: bytes) -> dict[str, Any] | None:
    """The object in a line or a file of this module; None if it is torn or differs from its checksum."""
    content, _, end = text.rpartition(f'"{_CHECKSUM}": "'.encode())
    if not end.endswith(b"\n") or end[:8] != f"{zlib.crc32(content):08x}".encode():
        return None
    try:
        row = json.loads(text)
    except ValueError:
        return None
    del row[_CHECKSUM]
    return row


def _with_checksum(row: Mapping[str, Any], indent: int | None = None) -> str:
    content, key, end = json.dumps({**row, _CHECKSUM: ""}, ensure_ascii=False, indent=indent).rpartition(
        f'"{_CHECKSUM}": "'
    )
    return f"{content}{key}{zlib.crc32(content.encode()):08x}{end}\n"


def checksums(folder: Path, names: Iterable[str]) -> list[str]:
    """A line with the SHA-256 of each of these files, as `sha256sum` writes it; none for what is no file."""
    lines: list[str] = []
    for name in names:
        with contextlib.suppress(OSError), (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return lines


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
