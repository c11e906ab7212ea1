"""One exchange with a server: the request, its response read strictly, and the log of responses and usage."""

import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from oprd.errors import ServerError
from oprd.files import writing

# `finish_reason` of a text that the model ended, and of one that a limit cut; any other one loses the response
ENDED = frozenset({"stop", "stop_sequence", "eos", "eos_token", "end_turn"})
CUT = frozenset({"length", "max_tokens", "model_length"})


class Tokens(NamedTuple):
    """Token counts of a request, all samples together."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. `body`: as JSON, without model and seed. `upper_bound`: the most it can cost, for the budget."""

    endpoint: Literal["completions", "chat"]
    body: Mapping[str, Any]
    samples: int
    upper_bound: Tokens

    @property
    def most_bytes(self) -> int:
        """More than a correct response takes; a longer body is not read to its end."""
        prompt, completion = self.upper_bound
        return 2**20 + 512 * (completion + prompt * (1 + self.body.get("prompt_logprobs", 0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A whole response, one text per sample; not `finished`: cut at the length limit, or maybe cut."""

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    logprobs: list[dict[str, float] | None] | None
    """`prompt_logprobs` of the server, by token id; None if not asked for."""
    used: Tokens

    def pack(self) -> bytes:
        """What is kept of the response, as `read_response` reads it: the numbers alone, in float32's 9 digits."""
        rows = self.logprobs and [
            row and {i: {"logprob": float(f"{x:.9g}")} for i, x in row.items()} for row in self.logprobs
        ]
        reasons = ["stop" if finished else "length" for finished in self.finished]
        choices = [
            {"text": text, "message": {"content": text}, "finish_reason": reason, "prompt_logprobs": rows}
            for text, reason in zip(self.texts, reasons, strict=True)
        ]
        usage = {f"{name}_tokens": count for name, count in self.used._asdict().items()}
        return zlib.compress(json.dumps({"choices": choices, "usage": usage}).encode())


class BadResponseError(Exception):
    """The server sent something else than the whole response. `final`: it would do so again."""

    def __init__(self, what: str, used: Tokens, *, final: bool = False) -> None:
        super().__init__(what)
        self.used, self.final = used, final


def read_response(body: str | bytes, request: Request) -> Response:
    """The response in a body. Raises BadResponseError for anything but the whole response that was asked for."""
    bound = request.upper_bound
    try:
        content = json.loads(body)
        choices, usage = content["choices"], content.get("usage") or {}
        texts = tuple(
            c["text"] if request.endpoint == "completions" else c["message"]["content"] or "" for c in choices
        )
        "".join(texts).encode()  # an error unless all are text that can be written
        reasons = [c.get("finish_reason") for c in choices]
        counts = [usage.get(f"{name}_tokens") for name in Tokens._fields]
        # a count that cannot be true is taken for the most; SQLite holds sums of those that can
        used = Tokens(*(n if type(n) is int and 0 <= n < 2**40 else m for n, m in zip(counts, bound, strict=True)))
        logprobs = choices[0].get("prompt_logprobs") if choices else None
        if logprobs is not None:
            logprobs = [row and {i: float(entry["logprob"]) for i, entry in row.items()} for row in logprobs]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise BadResponseError("a response that is not the JSON it should be", bound) from None
    bad = partial(BadResponseError, used=Tokens(*map(max, bound, used)))
    if not choices:
        raise bad("an empty response")
    if len(choices) != request.samples:
        advice = "; set many_samples: false if the server takes no `n`" if len(choices) == 1 else ""
        raise bad(f"{len(choices)} samples for the {request.samples} asked for{advice}")
    if used.completion > bound.completion:
        raise bad(f"a longer response than asked for ({used.completion} tokens)")
    if other := [reason for reason in reasons if reason not in [None, *ENDED, *CUT]]:
        raise bad(f"a response that neither ended nor was cut (finish_reason {str(other[0])[:50]!r})", final=True)
    # without a reason, a lone text shorter than the limit was not cut by it; of several, nobody knows which one is short
    ended = len(choices) == 1 and used.completion < bound.completion
    finished = tuple(ended if reason is None else reason in ENDED for reason in reasons)
    return Response(texts=texts, finished=finished, logprobs=logprobs, used=used)


class UsageLog:
    """The cache file: bodies of responses by key, and what was spent.

    `account`: run (several may share the file), name of the teacher among several or "", rank.
    """

    def __init__(self, file: Path, account: tuple[str, str, int]) -> None:
        self._account, self._file = account, file
        try:
            # opened in one thread, used in another
            self._database = sqlite3.connect(file, timeout=60.0, check_same_thread=False)
            self._database.executescript(
                "PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, body BLOB);"
                "CREATE TABLE IF NOT EXISTS usage (run TEXT, teacher TEXT, rank INTEGER, requests INTEGER, "
                "prompt INTEGER, completion INTEGER, PRIMARY KEY (run, teacher, rank));"
            )
        except sqlite3.Error as error:
            raise ServerError(f"{file} cannot be used as the teacher's cache: {error}. Move it away") from error
        self.close = self._database.close

    def find(self, key: str | None, request: Request) -> Response | None:
        """The response kept under a key; None too if what is kept is damaged."""
        row = self._database.execute("SELECT body FROM responses WHERE key = ?", (key,)).fetchone()
        try:
            return row and read_response(zlib.decompress(row[0]) if isinstance(row[0], bytes) else row[0], request)
        except (BadResponseError, zlib.error):
            return None

    def spent(self, *, by_all: bool = False) -> tuple[int, int, int]:
        """Requests, prompt and completion tokens over all starts: of this rank, or of all ranks there ever were."""
        sums = "IFNULL(SUM(requests), 0), IFNULL(SUM(prompt), 0), IFNULL(SUM(completion), 0)"
        query = f"SELECT {sums} FROM usage WHERE run = ? AND teacher = ? AND (rank = ? OR ?)"
        return self._database.execute(query, (*self._account, by_all)).fetchone()

    def add(self, requests: int, tokens: Sequence[int], key: str | None = None, body: bytes | None = None) -> None:
        """Add usage, and keep a packed response if it has a key: both or neither."""
        with writing(self._file), self._database as database:
            if key is not None and body is not None:
                database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?)", (key, body))
            database.execute("INSERT OR IGNORE INTO usage VALUES (?, ?, ?, 0, 0, 0)", self._account)
            more = "UPDATE usage SET requests = requests + ?, prompt = prompt + ?, completion = completion + ?"
            database.execute(f"{more} WHERE run = ? AND teacher = ? AND rank = ?", (requests, *tokens, *self._account))
