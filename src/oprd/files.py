"""Files that survive a crash: written whole or appended line by line, and synced."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from oprd.errors import RunFolderError


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
