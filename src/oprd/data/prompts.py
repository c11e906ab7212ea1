"""Datasets of prompts: read, checked row by row, rendered for the student; and the order in which they are used."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from oprd.data.chat import encode, fill, refuse_beyond, render_all, with_prompt
from oprd.data.rows import Row, TableRows, open_rows, spelled
from oprd.errors import DataError, OverlongPrompt
from oprd.progress import console, progress_bar
from oprd.section import OwnPrompt, PositiveInt
from oprd.types import Message, Prompt

TEXT_COLUMNS = ("prompt", "problem", "question")
UNUSABLE = ("tools", "images", "image", "videos", "audio")
"""Columns that change what a conversation means to a model."""
MANY = 10_000
"""Prompts that are read and checked before a run even if it uses fewer; from here on a bar is shown."""
TOGETHER = 256
"""Prompts that are tokenized in one call."""
DIGESTED = 1024
"""Prompts whose text a run remembers."""


class RowsSection(OwnPrompt):
    """Rows of a dataset, and the prompt that is made of each."""

    limit: PositiveInt | None = None
    """Use only the first rows."""
    answer: str = "answer"
    """Column of the reference answer; `a.b` is field b of the nested column a."""


class DataConfig(RowsSection):
    """Prompts for training.

    Columns: one of `prompt`, `problem`, `question` (text) or `messages`; optionally `answer`, `teacher`, `completion`.
    The letters of a control token in a message, such as `<|im_end|>`, are letters to the model.
    """

    prompts: str
    """JSONL, Parquet or CSV file, or Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    drop_overlong: bool = False
    """Drop prompts that leave no room for a completion in the context, and say how many; false: refuse them."""
    deduplicate: bool = False
    """Use the first of equal prompts alone."""


def load_prompts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, context: int, room: int, vocabulary: int = 2**31,
    given: Dataset | None = None,
) -> tuple[Prompt, ...]:  # fmt: skip
    """Every prompt of the dataset at once. Raises DataError as `Prompts` does."""
    prompts = Prompts(config, tokenizer, context=context, room=room, vocabulary=vocabulary, given=given)
    for note in prompts.notes:
        console.print(note)
    return prompts.prepare()


class Prompts(Sequence[Prompt]):
    """The prompts of a dataset, in the model's chat template and tokens, each made when it is first used.

    `context` is the model's context length, `room` the part that completions may take, in tokens; `vocabulary` the rows of its
    embedding. `given` replaces reading by name, `view` adds what the teacher sees. Raises DataError, with file and line, for
    a malformed row, an empty dataset, a prompt that does not leave that room, or a token that has no row.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, context: int, room: int, vocabulary: int = 2**31,
        given: Dataset | None = None, view: Callable[[Sequence[Prompt]], Sequence[Prompt]] = lambda prompts: prompts,
    ) -> None:  # fmt: skip
        self._config, self._tokenizer, self._room, self._view = config, tokenizer, context - room, view
        self._rows = TableRows(given) if given is not None else open_rows(config.prompts, config.split)
        self._made: dict[int, Prompt] = {}
        self._vocabulary, self.notes = vocabulary, list[str]()
        total = len(self._rows) if config.limit is None else min(config.limit, len(self._rows))
        self._kept: Sequence[int] = range(total)
        if config.deduplicate:
            self._kept = self._first_of_equals(self._kept)
        if config.drop_overlong:
            self._kept = self._fitting(self._kept)
        if not self._kept:
            raise DataError(
                f"{config.prompts}: the dataset is empty" + (", or every prompt is too long" if total else "")
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        row = self._kept[index]
        if row not in self._made:
            self._made |= self._make([row])
        return self._made[row]

    def prepare(self, indices: Iterable[int] | None = None) -> tuple[Prompt, ...]:
        """The prompts at `indices`, in the order of the dataset; all without. What is wrong with one is found here."""
        chosen = range(len(self)) if indices is None else sorted(set(indices))
        new = [row for row in (self._kept[i] for i in chosen) if row not in self._made]
        for prompts in self._in_batches(new, "read prompts"):
            self._made |= prompts
        prompts = tuple(self[i] for i in chosen)
        if self._config.answer != "answer" and all(prompt.answer is None for prompt in prompts):
            raise DataError(
                f"data.answer is {self._config.answer!r}, which no row of {self._config.prompts} has; correct the name, "
                "or drop it"
            )
        return prompts

    def digest(self, seed: int) -> str:
        """Hash that tells the dataset from another one: of its file, and of what student and teacher read of the first prompts
        of a run with this seed and of their answers."""
        found = hashlib.sha256(f"{self._rows.digest} {len(self)}".encode())
        for i in in_order(range(min(DIGESTED, len(self))), len(self), seed):
            p = self[i]
            found.update(repr((p.token_ids, p.teacher_messages, p.answer, p.teacher, p.completion)).encode())
        return found.hexdigest()

    def _in_batches(
        self, rows: Sequence[int], what: str, *, drop_overlong: bool = False
    ) -> Iterator[dict[int, Prompt]]:
        with progress_bar(what, len(rows), shown=len(rows) >= MANY) as bar:
            for first in range(0, len(rows), TOGETHER):
                some = rows[first : first + TOGETHER]
                yield self._make(some, drop_overlong=drop_overlong)
                bar.advance(len(some))

    def _make(self, rows: Sequence[int], *, drop_overlong: bool = False) -> dict[int, Prompt]:
        """The prompts of these rows. Raises DataError for the first that is wrong, with its place."""
        try:
            return dict(zip(rows, self._view(self._read(rows)), strict=True))
        except DataError as error:
            if len(rows) == 1:
                if drop_overlong and isinstance(error, OverlongPrompt):
                    return {}
                raise type(error)(f"{self._rows.where(rows[0])}: {error}") from None
        half = len(rows) // 2
        parts = (self._make(part, drop_overlong=drop_overlong) for part in (rows[:half], rows[half:]))
        return {row: prompt for part in parts for row, prompt in part.items()}

    def _read(self, rows: Sequence[int]) -> list[Prompt]:
        prompts = [_prompt(row, self._rows[row], self._config) for row in rows]
        messages = [prompt.messages for prompt in prompts]
        ids = render_all(self._tokenizer, messages, self._config.chat_template_kwargs)
        for prompt, some in zip(prompts, ids, strict=True):
            if len(self._tokenizer) > self._vocabulary:
                written = encode(self._tokenizer, prompt.completion or "")
                refuse_beyond(self._tokenizer, (*some, *written), self._vocabulary)
            if not 0 < len(some) <= self._room:
                raise OverlongPrompt(
                    f"the prompt has {len(some)} tokens, the context less max_completion_length leaves {self._room}; "
                    "shorten or drop the prompt, or lower max_completion_length"
                )
        return [replace(prompt, token_ids=some) for prompt, some in zip(prompts, ids, strict=True)]

    def _first_of_equals(self, rows: Sequence[int]) -> Sequence[int]:
        found: dict[bytes, int] = {}
        with progress_bar("compare prompts", len(rows), shown=len(rows) >= MANY) as bar:
            for number, row in enumerate(rows, start=1):
                columns = self._rows[row]
                shown = [columns.get(name) for name in ("messages", *TEXT_COLUMNS)]
                found.setdefault(hashlib.blake2b(repr(shown).encode(), digest_size=16).digest(), row)
                if number % MANY == 0:
                    bar.advance(MANY)
        self.notes.append(f"{self._config.prompts}: {len(found)} different prompts in {len(rows)} rows")
        return array("Q", found.values())

    def _fitting(self, rows: Sequence[int]) -> Sequence[int]:
        kept = array("Q")
        for prompts in self._in_batches(rows, "measure prompts", drop_overlong=True):
            kept.extend(prompts)
        dropped = len(rows) - len(kept)
        self.notes.append(
            f"{self._config.prompts}: {dropped} of {len(rows)} prompts leave no room for a completion and are dropped"
        )
        return kept


class PromptSampler:
    """Prompts in shuffled epochs. The prompts of a step depend on seed and step alone, so there is no state to save."""

    def __init__(self, prompts: Sequence[Prompt], *, per_step: int, seed: int, rank: int, world_size: int) -> None:
        self._prompts, self._per_step, self._seed = prompts, per_step, seed
        self._rank, self._world_size = rank, world_size

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """This rank's prompts of a step, counted from 0: every world_size-th of the step's."""
        first = step * self._per_step
        places = range(first, first + self._per_step)[self._rank :: self._world_size]
        return tuple(self._prompts[place] for place in in_order(places, len(self._prompts), self._seed))


def in_order(places: Iterable[int], size: int, seed: int) -> Iterator[int]:
    """The prompt at each place of the shuffled epochs of `size` prompts."""
    return (_epoch_order(size, seed, place // size)[place % size] for place in places)


@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> Sequence[int]:
    """Shuffled rows of an epoch; cached, because every prompt of every step needs it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return array("q", torch.randperm(size, generator=generator).tolist())


def _prompt(number: int, row: Row, config: DataConfig) -> Prompt:
    """The prompt of a row, not yet tokenized."""
    columns = {name: str(spelled(value)) for name, value in row.items() if isinstance(value, str | int | float)}
    # the student and an evaluation never see the reference answer; a teacher may
    shown = {name: text for name, text in columns.items() if name != config.answer}
    messages, completion = _messages(row, shown, config)
    answer, teacher = _field(row, config.answer), row.get("teacher")
    return Prompt(
        row=number,
        messages=messages,
        token_ids=(),
        answer=spelled(answer),
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
    if completion is not None and type(completion) is not str:
        raise DataError(f"column 'completion' must be text or messages, got {completion!r}")
    return with_prompt(turns, columns, config.system_prompt, template), completion


def _text(row: Row) -> str:
    """The first text column that the row has."""
    name = next((name for name in TEXT_COLUMNS if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"needs one of the columns {', '.join(TEXT_COLUMNS)}, has {', '.join(row) or 'none'}")
    if type(row[name]) is not str or not row[name].strip():
        raise DataError(f"column {name!r} must be non-empty text, got {row[name]!r}")
    return row[name]


def _turn(turn: Any) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    if type(role) is not str or type(content) is not str:
        raise DataError(f"a message must have text 'role' and 'content', got {turn!r}")
    lost = [key for key, value in turn.items() if key not in {"role", "content"} and value]
    if lost:
        raise DataError(f"a message has {lost[0]!r}, which is not supported and would be left out; drop the row")
    return Message(role=role, content=content)
