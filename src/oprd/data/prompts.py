"""Datasets of prompts: read, checked row by row, rendered for the student; and the order in which they are used."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from oprd.config.recipe import DataConfig
from oprd.data.chat import fill, render, with_prompt
from oprd.errors import DataError
from oprd.types import Message, Prompt, PromptBatch

TEXT_COLUMNS = ("prompt", "problem", "question")


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    room: int,
    given: datasets.Dataset | None = None,
) -> tuple[Prompt, ...]:
    """Every prompt of the dataset, rendered with the model's chat template.

    `context` is the model's context length and `room` what completions may take of it, in tokens. Raises DataError naming
    file and line for a malformed row, an empty dataset, or a prompt that does not leave that room.
    """
    rows = _rows_of(given) if given is not None else read_rows(config.prompts, config.split)
    prompts = []
    for number, (where, row) in enumerate(rows):
        if config.limit is not None and number >= config.limit:
            break
        prompts.append(_prompt(number, where, row, config, tokenizer, context - room))
    if not prompts:
        raise DataError(f"{config.prompts}: the dataset is empty")
    if config.answer != "answer" and all(prompt.answer is None for prompt in prompts):
        raise DataError(
            f"data.answer is {config.answer!r}, which no row of {config.prompts} has; correct the name, or drop it"
        )
    return tuple(prompts)


class PromptSampler:
    """Prompts in shuffled epochs. The batch of a step depends on seed and step alone, so there is nothing to save."""

    def __init__(self, prompts: tuple[Prompt, ...], *, per_step: int, seed: int, rank: int, world_size: int) -> None:
        self._prompts = prompts
        self._per_step = per_step
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def batch(self, step: int) -> PromptBatch:
        """This process's prompts of a step, counted from 0: every world_size-th of the step's."""
        first = step * self._per_step
        places = range(first, first + self._per_step)[self._rank :: self._world_size]
        return PromptBatch(prompts=tuple(self._prompts[self._row(place)] for place in places))

    def _row(self, place: int) -> int:
        epoch, at = divmod(place, len(self._prompts))
        return _epoch_order(len(self._prompts), self._seed, epoch)[at]


@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The shuffled rows of an epoch; kept, because every prompt of every step asks for it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(size, generator=generator).tolist())


def read_rows(source: str, split: str = "train") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of a JSONL, Parquet or CSV file, or of a Hub dataset. `where` is for error messages."""
    path = Path(source)
    if path.suffix in {".jsonl", ".json"}:
        yield from _json_lines(path)
    elif path.suffix in {".parquet", ".csv"}:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        kind = path.suffix[1:]
        try:
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise DataError(f"{path}: cannot be read as {kind}: {error}") from error
        yield from _rows_of(loaded, source)
    else:
        try:
            loaded = datasets.load_dataset(source, split=split)
        except (OSError, ValueError, DatasetNotFoundError) as error:
            raise DataError(
                f"{source!r} is neither a .jsonl, .parquet or .csv file nor a dataset that can be reached: {error}"
            ) from error
        yield from _rows_of(loaded, source)


def text_of(where: str, row: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of the named columns that the row has, as non-empty text."""
    for name in names:
        if row.get(name) is not None:
            value = row[name]
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{where}: column {name!r} must be non-empty text, got {value!r}")
            return value
    raise DataError(f"{where}: needs one of the columns {', '.join(names)}, has {', '.join(row) or 'none'}")


def text_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Columns that a template can use: text and numbers."""
    return {name: str(value) for name, value in row.items() if isinstance(value, str | int | float)}


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{where}: must be a JSON object, got {type(row).__name__}")
                yield where, row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error


def _rows_of(dataset: datasets.Dataset, source: str = "dataset") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(dataset, start=1):
        yield f"{source}, row {number}", cast(Mapping[str, Any], row)


def _prompt(
    number: int,
    where: str,
    row: Mapping[str, Any],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
) -> Prompt:
    columns = text_columns(row)
    try:
        messages, completion = _messages(where, row, columns, config)
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from None
    token_ids = render(tokenizer, messages)
    if not 0 < len(token_ids) <= longest:
        raise DataError(
            f"{where}: the prompt has {len(token_ids)} tokens, the context less max_completion_length leaves {longest}; "
            "shorten or drop the prompt, or lower max_completion_length"
        )
    answer, teacher = _field(where, row, config.answer), row.get("teacher")
    return Prompt(
        row=number,
        messages=messages,
        token_ids=token_ids,
        answer=None if answer is None else str(answer),
        teacher=None if teacher is None else str(teacher),
        completion=completion,
        columns=columns,
    )


def _field(where: str, row: Mapping[str, Any], path: str) -> Any:
    """The column `path`, or with dots in it a field of a nested one; None where there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: data.answer is {path!r}, but what should hold {name!r} is {value!r}")
        value = value.get(name)
        if value is None:
            return None
    return value


def _messages(
    where: str, row: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig
) -> tuple[tuple[Message, ...], str | None]:
    """The conversation, and the completion if the dataset gives one (its column, or a last assistant message)."""
    completion = row.get("completion")
    given = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if isinstance(given, list):
        turns = [_turn(where, turn) for turn in given]
        if turns and turns[-1].role == "assistant":
            completion = turns.pop().content
        if not turns:
            raise DataError(f"{where}: the conversation has no message before the assistant's")
    else:
        text = fill(config.prompt_template, columns) if config.prompt_template else text_of(where, row, TEXT_COLUMNS)
        turns = [Message(role="user", content=text)]
    if isinstance(completion, list):
        completion = "".join(_turn(where, turn).content for turn in completion)
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{where}: column 'completion' must be text or messages, got {completion!r}")
    template = config.prompt_template if isinstance(given, list) else None
    return with_prompt(turns, columns, config.system_prompt, template), completion


def _turn(where: str, turn: Any) -> Message:
    if (
        not isinstance(turn, Mapping)
        or not isinstance(turn.get("role"), str)
        or not isinstance(turn.get("content"), str)
    ):
        raise DataError(f"{where}: a message must have text 'role' and 'content', got {turn!r}")
    return Message(role=turn["role"], content=turn["content"])
