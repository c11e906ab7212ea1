"""Rows of a dataset, read when they are used: a file of two million opens in seconds."""

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import pandas as pd
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from oprd.errors import DataError

Row = Mapping[str, Any]


class Number(str):
    """A number of a JSON file, as it is spelled there: 1e5, 0.10, an integer of any length."""

    __slots__ = ()


class Rows(ABC):
    """A dataset's rows by index."""

    digest: str
    """Hash of what the rows come from; empty where that is not a file."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Raises DataError for a row that is malformed."""

    @abstractmethod
    def where(self, index: int) -> str:
        """File and line, for error messages."""


def open_rows(source: str, split: str) -> Rows:
    """Rows of a .jsonl, .parquet or .csv file, or of a Hub dataset. Raises DataError for what cannot be read."""
    path, kind = Path(source), Path(source).suffix.removeprefix(".")
    if not source.strip("./~ "):
        raise DataError(f"{source!r} names no dataset; give a .jsonl, .parquet or .csv file, or a Hub name")
    is_file = kind in {"jsonl", "json", "parquet", "csv"}
    try:
        if kind in {"jsonl", "json"}:
            return _JsonLines(path)
        if is_file:
            # read by ourselves: the cache of `datasets` knows a file by its time stamp, and types change spellings
            text = {"dtype": str, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
            dataset = (
                Dataset.from_pandas(pd.read_csv(path, **cast(Any, text)))
                if kind == "csv"
                else Dataset(pyarrow.parquet.read_table(path))
            )
            with path.open("rb") as file:
                return TableRows(dataset, source, hashlib.file_digest(file, "sha256").hexdigest())
        return TableRows(cast(Dataset, load_dataset(source, split=split)), source)
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, DatasetsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:500]
        if is_file:
            raise DataError(f"{path}: {reason}") from error
        nothing = f"{source!r} is neither a .jsonl, .parquet or .csv file nor a dataset that can be reached"
        raise DataError(f"{nothing}: {reason}") from error


@final
class TableRows(Rows):
    """Rows of a `datasets.Dataset`, memory-mapped where it is."""

    def __init__(self, dataset: Dataset, source: str = "dataset", digest: str = "") -> None:
        self._dataset, self._source, self.digest = dataset, source, digest

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        return cast(Row, self._dataset[index])

    def where(self, index: int) -> str:
        return f"{self._source}, row {index + 1}"


@final
class _JsonLines(Rows):
    """Rows of a JSONL file by the place of each line. Lines end at newlines only: U+2028 and others are text."""

    def __init__(self, path: Path) -> None:
        self._path, self._starts, self._lines = path, array("Q"), array("Q")
        at, found = 0, hashlib.sha256()
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self._starts.append(at)
                    self._lines.append(number)
                at += len(line)
                found.update(line)
        self.digest = found.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Row:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            text = line.decode("utf-8-sig")
            row = json.loads(text, parse_int=Number, parse_float=Number, parse_constant=lambda _: None)
            if "\\u" in text:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}") from error
        except UnicodeEncodeError as error:
            raise DataError(f"half of a surrogate pair, which is no text: {error.object[error.start]!r}") from error
        except RecursionError as error:
            raise DataError("nested too deeply") from error
        except ValueError as error:
            raise DataError(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"must be a JSON object, got {type(row).__name__}")
        return row


def spelled(value: Any) -> str | None:
    """A value as text: a number as it is spelled or without an exponent, the one item of a list, several by commas; None
    for nothing. Raises DataError for what is no text."""
    if value is None or value != value or value == []:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list):
        return ", ".join(text for text in map(spelled, value) if text is not None)
    raise DataError(f"an answer must be text, a number or a list of these, got {str(value)[:200]}")
