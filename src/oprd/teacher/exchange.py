"""A server's section of a recipe; a request to it, its response read strictly, and the log of responses and usage."""

import json
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from oprd.errors import ConfigError, DiskError, ServerError
from oprd.section import Field, Listed, NonNegativeFloat, NonNegativeInt, PositiveInt, Rate, Section

# `finish_reason` of a text that the model ended, and of one that a limit cut; any other one loses the response
ENDED = frozenset({"stop", "stop_sequence", "eos", "eos_token", "end_turn"})
CUT = frozenset({"length", "max_tokens", "model_length"})


def is_address(url: str) -> bool:
    """Whether it is `http://host:port/path`, without a password, ? or # in it."""
    address = urlsplit(url)
    return bool(re.fullmatch(r"https?://[^\s@?#]+", url) and address.hostname and address.port != 0)


def read_key(variable: str | None, option: str = "api_key_env") -> str:
    """The key in an environment variable that an option names; empty where none is named. Raises ConfigError."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ConfigError(f"{option} names the environment variable {variable}, which is not set")
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"the key in {variable} has characters that no HTTP header can hold")
    return key


class KeySection(Section):
    """The key of a server. It is written nowhere."""

    model_config = ConfigDict(hide_input_in_errors=True)  # someone may write the key itself in place of its name

    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere."""

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, name: str | None) -> str | None:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name or "NONE"):
            example = "such as OPENAI_API_KEY"
            raise ValueError(f"api_key_env must be the name of an environment variable in capitals, {example}")
        return name


class ServerSection(KeySection):
    """How a server is reached, and what may be spent on it."""

    base_url: str
    """`http://localhost:8000/v1`."""
    model: str
    """The name the server knows the model by."""
    concurrency: PositiveInt = 32
    """Requests under way at once, on one process."""
    timeout_s: Rate = 120.0
    """Of one request."""
    step_timeout_s: Annotated[Rate, Field(le=7 * 24 * 3600)] = 1800.0
    """Of all requests of a step; those without a response by then are lost."""
    max_retries: NonNegativeInt = 6
    """Of one request, with the pauses of the `openai` package: 0.5 s, doubled up to 8 s, or what Retry-After asks for."""
    price_per_million: Listed[NonNegativeFloat] | None = None
    """[prompt, completion]: prices of a million tokens, in any currency."""
    max_requests: PositiveInt | None = None
    """Budgets of the run over all its starts and processes, retries included; it stops before it passes one."""
    max_tokens: PositiveInt | None = None
    """Prompt and completion tokens."""
    max_cost: Rate | None = None
    """In the currency of `price_per_million`."""

    @model_validator(mode="after")
    def _check_server(self) -> "ServerSection":
        prices = self.price_per_million
        if not is_address(self.base_url):
            raise ValueError("base_url must look like http://host:port/v1, without a password, ? or # in it")
        if prices is not None and len(prices) != 2:
            raise ValueError("price_per_million must be two prices: [prompt, completion]")
        if self.max_cost is not None and not any(prices or ()):
            raise ValueError("max_cost needs price_per_million: [prompt, completion]")
        return self

    def amounts(self, requests: int, prompt: int, completion: int) -> dict[str, float]:
        """Requests and tokens in the units of the budgets, by their field names."""
        prices = self.price_per_million or (0.0, 0.0)
        cost = (prompt * prices[0] + completion * prices[1]) / 1e6
        return {"max_requests": float(requests), "max_tokens": float(prompt + completion), "max_cost": cost}


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
