"""One exchange with a server: the request, its response read strictly, and the log of responses and usage."""

import json
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from oprd.errors import DiskError, ServerError

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

    endpoint: Literal["completions", "chat/completions"]
    body: Mapping[str, Any]
    samples: int
    upper_bound: Tokens

    @property
    def most_bytes(self) -> int:
        """More than a correct response takes; a longer body is not read to its end."""
        prompt, completion = self.upper_bound
        return 2**20 + 512 * (completion + prompt * (1 + self.body.get("prompt_logprobs", 0)))


class Response(BaseModel):
    """A whole response, one text per sample; not `finished`: cut at the length limit, or maybe cut. The cache keeps it as JSON."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    logprobs: list[dict[str, float] | None] | None
    """`prompt_logprobs` of the server, by token id, in float32's 9 digits; None if not asked for."""
    used: Tokens


class Failure(Exception):
    """Why a request has no response. `used`: what it may have cost all the same. `final`: it would fail so again.

    `advice`: what to do about it, where every other request would fail so too.
    """

    def __init__(self, what: str, used: Tokens, *, advice: str = "", final: bool = False) -> None:
        super().__init__(what)
        self.used, self.advice, self.final = used, advice, final


def read_response(body: bytes, request: Request) -> Response:
    """The response in a body. Raises Failure for anything but the whole response that was asked for."""
    bound = request.upper_bound
    try:
        content = json.loads(body)
        choices, usage = content["choices"], content.get("usage") or {}
        texts = [c["text"] if request.endpoint == "completions" else c["message"]["content"] or "" for c in choices]
        "".join(texts).encode()  # an error unless all are text that can be written
        reasons = [c.get("finish_reason") for c in choices]
        counts = [usage.get(f"{name}_tokens") for name in Tokens._fields]
        # a count that cannot be true is taken for the most; SQLite holds sums of those that can
        used = Tokens(*(n if type(n) is int and 0 <= n < 2**40 else m for n, m in zip(counts, bound, strict=True)))
        logprobs = choices[0].get("prompt_logprobs") if choices else None
        if logprobs is not None:
            logprobs = [row and {i: float(f"{x['logprob']:.9g}") for i, x in row.items()} for row in logprobs]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise Failure("a response that is not the JSON it should be", bound) from None
    bad = partial(Failure, used=Tokens(*map(max, bound, used)))
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
    finished = [ended if reason is None else reason in ENDED for reason in reasons]
    return Response(texts=tuple(texts), finished=tuple(finished), logprobs=logprobs, used=used)


class UsageLog:
    """The cache file: responses by key, and what was spent. Raises DiskError or ServerError where it cannot be used.

    `account`: run (several may share the file), name of the teacher among several or "", rank.
    """

    def __init__(self, file: Path, account: tuple[str, str, int]) -> None:
        self._account, self._file = account, file
        with self._errors():
            # opened in one thread, used in another
            self._database = sqlite3.connect(file, timeout=60.0, check_same_thread=False)
            self._share()
            self._database.executescript(
                "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, body BLOB);"
                "CREATE TABLE IF NOT EXISTS usage (run TEXT, teacher TEXT, rank INTEGER, requests INTEGER, "
                "prompt INTEGER, completion INTEGER, PRIMARY KEY (run, teacher, rank));"
            )
        self.close = self._database.close

    def _share(self) -> None:
        """Let several processes use the file at once. SQLite does not wait here for another that does the same."""
        for attempt in range(1200):
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or attempt == 1199:
                    raise
                time.sleep(0.05)

    def find(self, key: str | None) -> Response | None:
        """The response kept under a key; None too if what is kept is damaged."""
        with self._errors():
            row = self._database.execute("SELECT body FROM responses WHERE key = ?", (key,)).fetchone()
        try:
            return row and Response.model_validate_json(zlib.decompress(row[0]))
        except (ValidationError, zlib.error, TypeError):
            return None

    def spent(self, *, by_all: bool = False) -> tuple[int, int, int]:
        """Requests, prompt and completion tokens over all starts: of this rank, or of all ranks there ever were."""
        sums = "IFNULL(SUM(requests), 0), IFNULL(SUM(prompt), 0), IFNULL(SUM(completion), 0)"
        query = f"SELECT {sums} FROM usage WHERE run = ? AND teacher = ? AND (rank = ? OR ?)"
        with self._errors():
            return self._database.execute(query, (*self._account, by_all)).fetchone()

    def add(self, requests: int, tokens: Tokens, key: str | None = None, response: Response | None = None) -> None:
        """Add usage, and keep a response if it has a key: both or neither."""
        with self._errors(), self._database as database:
            if key is not None and response is not None:
                body = zlib.compress(response.model_dump_json().encode())
                database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?)", (key, body))
            database.execute(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + "
                "excluded.requests, prompt = prompt + excluded.prompt, completion = completion + excluded.completion",
                (*self._account, requests, *tokens),
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 255 in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}:
                advice = "What was there before is intact; make room, then go on"
                raise DiskError(f"cannot write {self._file}: {error}. {advice}") from error
            advice = "Stop what else uses it, or move it away"
            raise ServerError(f"{self._file} cannot be used as the teacher's cache: {error}. {advice}") from error
