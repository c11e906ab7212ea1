"""Datasets of prompts: read, checked row by row, rendered for the student; and the order in which they are used."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import fill, render, with_prompt
from oprd.errors import DataError
from oprd.section import OwnPrompt, PositiveInt
from oprd.types import Message, Prompt

TEXT_COLUMNS = ("prompt", "problem", "question")
UNUSABLE = ("tools", "images", "image", "videos", "audio")
"""Columns that change what a conversation means to a model."""
Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]
"""(where, row): file and line for error messages, and the columns."""


class RowsSection(OwnPrompt):
    """Rows of a dataset, and the prompt that is made of each."""

    limit: PositiveInt | None = None
    """Use only the first rows."""


class DataConfig(RowsSection):
    """Prompts for training.

    Columns: one of `prompt`, `problem`, `question` (text) or `messages`; optionally `answer`, `teacher`, `completion`.
    """

    prompts: str
    """JSONL, Parquet or CSV file, or Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    answer: str = "answer"
    """Column of the reference answer; `a.b` is field b of the nested column a."""


def load_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, context: int, room: int, given: Dataset | None = None
) -> tuple[Prompt, ...]:
    """Every prompt of the dataset, in the model's chat template and tokens. `given` replaces reading by name.

    `context` is the model's context length, `room` the part that completions may take, in tokens. Raises DataError, with
    file and line, for a malformed row, an empty dataset, or a prompt that does not leave that room.
    """
    rows = _rows_of(given) if given is not None else _read_rows(config.prompts, config.split)
    prompts = []
    for number, (where, row) in enumerate(islice(rows, config.limit)):
        try:
            prompts.append(_prompt(number, row, config, tokenizer, context - room))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not prompts:
        raise DataError(f"{config.prompts}: the dataset is empty")
    if config.answer != "answer" and all(prompt.answer is None for prompt in prompts):
        raise DataError(
            f"data.answer is {config.answer!r}, which no row of {config.prompts} has; correct the name, or drop it"
        )
    return tuple(prompts)


def digest(prompts: Iterable[Prompt]) -> str:
    """Hash of what student and teacher read and of the answers, to tell a dataset from another one."""
    found = hashlib.sha256()
    for p in prompts:
        found.update(repr((p.token_ids, p.teacher_messages, p.answer, p.teacher, p.completion)).encode())
    return found.hexdigest()


class PromptSampler:
    """Prompts in shuffled epochs. The prompts of a step depend on seed and step alone, so there is no state to save."""

    def __init__(self, prompts: tuple[Prompt, ...], *, per_step: int, seed: int, rank: int, world_size: int) -> None:
        self._prompts, self._per_step, self._seed = prompts, per_step, seed
        self._rank, self._world_size = rank, world_size

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """This rank's prompts of a step, counted from 0: every world_size-th of the step's."""
        first, n = step * self._per_step, len(self._prompts)
        places = range(first, first + self._per_step)[self._rank :: self._world_size]
        return tuple(self._prompts[_epoch_order(n, self._seed, place // n)[place % n]] for place in places)


@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Shuffled rows of an epoch; cached, because every prompt of every step needs it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(size, generator=generator).tolist())


def _read_rows(source: str, split: str) -> Rows:
    path, kind = Path(source), Path(source).suffix.removeprefix(".")
    if not source.strip("./~ "):
        raise DataError(f"{source!r} names no dataset; give a .jsonl, .parquet or .csv file, or a Hub name")
    if kind in {"jsonl", "json"}:
        return _json_lines(path)
    is_file = kind in {"parquet", "csv"}
    if is_file and not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        if is_file:
            return _rows_of(load_dataset(kind, data_files=source, split="train"), source)
        return _rows_of(load_dataset(source, split=split), source)
    except (OSError, ValueError, DatasetGenerationError, DatasetNotFoundError) as error:
        nothing = f"{source!r} is neither a .jsonl, .parquet or .csv file nor a dataset that can be reached"
        raise DataError(f"{path}: cannot be read as {kind}: {error}" if is_file else f"{nothing}: {error}") from error


def _json_lines(path: Path) -> Rows:
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
                    yield f"{path}:{number}", row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from error


def _rows_of(dataset: Dataset, source: str = "dataset") -> Rows:
    return ((f"{source}, row {number}", cast(Row, row)) for number, row in enumerate(dataset, start=1))


def _prompt(number: int, row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase, room: int) -> Prompt:
    columns = {name: str(value) for name, value in row.items() if isinstance(value, str | int | float)}
    # the student and an evaluation never see the reference answer; a teacher may
    shown = {name: text for name, text in columns.items() if name != config.answer}
    messages, completion = _messages(row, shown, config)
    token_ids = render(tokenizer, messages)
    if not 0 < len(token_ids) <= room:
        raise DataError(
            f"the prompt has {len(token_ids)} tokens, the context less max_completion_length leaves {room}; "
            "shorten or drop the prompt, or lower max_completion_length"
        )
    answer, teacher = _field(row, config.answer), row.get("teacher")
    return Prompt(
        row=number,
        messages=messages,
        token_ids=token_ids,
        answer=None if answer is None else str(answer),
        teacher=None if teacher is None else str(teacher),
        completion=completion,
        columns=columns,
    )


def _field(row: Row, path: str) -> Any:
    """The column `path`, or with dots in it a field of a nested one; None where there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if value is None:
            break
        if not isinstance(value, Mapping):
            raise DataError(f"data.answer is {path!r}, but what should hold {name!r} is {value!r}")
        value = value.get(name)
    return value


def _messages(row: Row, columns: Mapping[str, str], config: DataConfig) -> tuple[tuple[Message, ...], str | None]:
    """The conversation, and the dataset's completion if there is one: its column, or a last assistant message."""
    for column in UNUSABLE:
        if row.get(column):
            raise DataError(
                f"column {column!r} would be left out, and the model would answer another prompt; drop the row"
            )
    completion = row.get("completion")
    given = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    template = config.prompt_template
    if isinstance(given, list):
        turns = [_turn(turn) for turn in given]
        if turns and turns[-1].role == "assistant":
            if completion is not None:
                raise DataError(
                    "the conversation ends with the assistant, and there is a column 'completion' too; drop one"
                )
            completion = turns.pop().content
        if not turns:
            raise DataError("the conversation has no message before the assistant's")
    else:
        text = fill(template, columns) if template else _text(row)
        turns, template = [Message(role="user", content=text)], None
    if isinstance(completion, list):
        answers = [_turn(turn) for turn in completion]
        if [turn.role for turn in answers] != ["assistant"]:
            raise DataError(f"column 'completion' must be one assistant message, has {len(answers)} messages")
        completion = answers[0].content
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"column 'completion' must be text or messages, got {completion!r}")
    return with_prompt(turns, columns, config.system_prompt, template), completion


def _text(row: Row) -> str:
    """The first text column that the row has."""
    name = next((name for name in TEXT_COLUMNS if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"needs one of the columns {', '.join(TEXT_COLUMNS)}, has {', '.join(row) or 'none'}")
    if not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"column {name!r} must be non-empty text, got {row[name]!r}")
    return row[name]


def _turn(turn: Any) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"a message must have text 'role' and 'content', got {turn!r}")
    lost = [key for key, value in turn.items() if key not in {"role", "content"} and value]
    if lost:
        raise DataError(f"a message has {lost[0]!r}, which is not supported and would be left out; drop the row")
    return Message(role=role, content=content)
