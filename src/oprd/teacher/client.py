"""Requests to an OpenAI-compatible server: many at once, tried again, never paid twice, never beyond the budget.

The answers of all steps lie in one SQLite file, and so does what was spent: a run that stops, for whatever reason, goes on
with both. The event loop lives in a thread for the length of one `send`, so that this works inside notebooks as well.
"""

import asyncio
import email.utils
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, final

import openai

from oprd.config.models import ServerTeacherConfig
from oprd.errors import ConfigError, ServerError
from oprd.teacher.book import BUDGETS, Book, amounts, cost_of, limits_of
from oprd.teacher.reply import BadReplyError, Call, Reply, read_reply
from oprd.types import Tally

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
REFUSED_QUESTIONS = frozenset({400, 413, 422})
"""Statuses that say something of one question, such as one too long for the server; the others hold for every one."""

_Outcome = tuple[list[list[Reply | None]], Counter[str]]
"""The replies, and how often each reason lost one."""


@final
class Client:
    """Sends the calls of a step. One for a teacher, by its `name` in the recipe, and process.

    `run` tells apart the accounts of runs that share a cache file.
    """

    def __init__(
        self,
        config: ServerTeacherConfig,
        *,
        cache: Path,
        run: str,
        name: str = "",
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        self._config = config
        self._key = _read_key(config)
        self._cache = cache
        self._account = (run, name, rank)
        # one server can know different weights by one name, and so can two servers
        self._asked = [config.model, name] if name else config.model
        self._seed = seed
        self._counts: Counter[str] = Counter()
        cache.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(cache, timeout=60.0)) as database:
            self._limits = limits_of(config, Book(database, self._account), processes)

    def send(self, chains: Sequence[Sequence[Call]]) -> list[list[Reply | None]]:
        """The reply to every call; None where it was lost. The calls of a chain go one after the other, chains side by side.

        Raises ServerError when nothing more can be had from the server or paid: the key is refused, the server is gone,
        the budget would be passed, more than `max_lost_share` of the replies were lost. Replies under way are waited for
        first, and kept.
        """
        before = self._counts["lost"]
        replies, reasons = _in_thread(self._send(chains, self._counts, cached=True))
        lost = self._counts["lost"] - before
        asked = sum(map(len, replies))
        allowed = self._config.max_lost_share
        if lost > allowed * asked:
            why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            raise ServerError(
                f"{self._config.base_url}: {lost} of {asked} replies of this step were lost ({why}); allowed is "
                f"max_lost_share={allowed}. Look at the server's log, or raise max_lost_share, then resume: what was "
                "answered is kept"
            )
        return replies

    def probe(self, call: Call, *, advice: str) -> Reply:
        """The server's reply of today, neither taken from the cache nor kept there, for the checks at start.

        Raises ServerError with what went wrong, and the advice.
        """
        ((reply,),), reasons = _in_thread(self._send([[call]], Counter(), cached=False))
        if reply is None:
            raise ServerError(
                f"{self._config.base_url} does not answer a check at start as it should: {', '.join(reasons)}. {advice}"
            )
        return reply

    def tallies(self) -> tuple[Tally, ...]:
        """What was sent since this was last read: whoever shares the client, nothing is reported twice or left out."""
        counts, config = self._counts, self._config
        self._counts = Counter()
        cost = cost_of(config, counts["prompt_tokens"], counts["completion_tokens"])
        names = ("requests", "retries", "cache_hits", "lost", "prompt_tokens", "completion_tokens")
        return (
            *(Tally(name=f"teacher/{name}/sum", total=counts[name]) for name in names),
            Tally(name="teacher/cost/sum", total=cost),
        )

    async def _send(self, chains: Sequence[Sequence[Call]], counts: Counter[str], *, cached: bool) -> _Outcome:
        keyed = self._keys(chains)
        with closing(sqlite3.connect(self._cache, timeout=60.0)) as database:
            book = Book(database, self._account)
            step = _Step(self._config, self._key, book, self._limits, counts, cached=cached)
            async with openai.AsyncOpenAI(
                base_url=self._config.base_url,
                api_key=self._key or "none",
                max_retries=0,  # ours count, and obey Retry-After of any length
                timeout=self._config.request_timeout_s,
            ) as api:
                replies = await step.run(api, keyed)
        counts["lost"] += sum(reply is None for chain in replies for reply in chain)
        if step.stop is not None:
            raise ServerError(step.stop)
        return replies, step.reasons

    def _keys(self, chains: Sequence[Sequence[Call]]) -> list[list[tuple[str, int, Call]]]:
        """Each call with its key in the cache and its seed. Equal calls of one step are different draws."""
        seen: Counter[str] = Counter()
        keyed = []
        for chain in chains:
            keyed.append([])
            for call in chain:
                content = json.dumps([self._asked, call.endpoint, call.body, call.samples, self._seed], sort_keys=True)
                digest = hashlib.sha256(f"{content}#{seen[content]}".encode()).digest()
                seen[content] += 1
                # 31 bits: what every server takes as a seed
                keyed[-1].append((digest.hex(), int.from_bytes(digest[:4], "big") >> 1, call))
        return keyed


class _Step:
    """The calls of one `send`, or of a probe without the cache."""

    def __init__(
        self,
        config: ServerTeacherConfig,
        key: str | None,
        book: Book,
        limits: tuple[float | None, ...],
        counts: Counter[str],
        *,
        cached: bool,
    ) -> None:
        self._config = config
        self._key = key
        self._book = book
        self._counts = counts
        self._cached = cached
        self._limits = limits
        self._free = asyncio.Semaphore(config.concurrency)
        self._settled = asyncio.Condition()
        self._under_way: Counter[str] = Counter()
        self._not_before = 0.0
        self._ends = time.monotonic() + config.step_timeout_s
        self.reasons: Counter[str] = Counter()
        """How often each lost a reply."""
        self.stop: str | None = None
        """Why nothing more is sent."""

    async def run(
        self, api: openai.AsyncOpenAI, chains: Sequence[Sequence[tuple[str, int, Call]]]
    ) -> list[list[Reply | None]]:
        replies: list[list[Reply | None]] = [[None] * len(chain) for chain in chains]

        async def walk(row: int) -> None:
            # a chain is finished once it is begun: its prefixes come while the server still has them
            async with self._free:
                for at, (key, seed, call) in enumerate(chains[row]):
                    replies[row][at] = self._known(key) or await self._ask(api, key, seed, call)

        tasks = [asyncio.create_task(walk(row)) for row in range(len(chains))]
        if not tasks:
            return replies
        _, late = await asyncio.wait(tasks, timeout=self._config.step_timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if late:
            missing = sum(reply is None for chain in replies for reply in chain) - self.reasons.total()
            self.reasons[f"no reply within step_timeout_s={self._config.step_timeout_s:g}"] += missing
        for task in tasks:
            if task not in late:
                task.result()
        return replies

    def _known(self, key: str) -> Reply | None:
        reply = self._book.find(key) if self._cached else None
        self._counts["cache_hits"] += reply is not None
        return reply

    async def _ask(self, api: openai.AsyncOpenAI, key: str, seed: int, call: Call) -> Reply | None:
        """Try until there is a reply, the attempts are used up, or nothing more is to be sent."""
        fault = _FaultError("not sent")
        for attempt in range(self._config.max_retries + 1):
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if not await self._afford(call):
                return None
            self._counts["requests"] += 1
            self._counts["retries"] += attempt > 0
            try:
                reply = await self._try(api, seed, call)
            except _FaultError as error:
                fault = self._if_there_is_time(error)
            else:
                self._book.charge(reply, store_as=key if self._cached else None)
                self._counts["prompt_tokens"] += reply.prompt_tokens
                self._counts["completion_tokens"] += reply.completion_tokens
                return reply
            finally:
                await self._settle(call)
            if fault.final:
                break
            # a limit on one is a limit on all
            self._not_before = max(self._not_before, time.monotonic() + fault.pause_s)
            if attempt < self._config.max_retries:
                await asyncio.sleep(max(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt), fault.pause_s))
        if fault.stops and self.stop is None:
            self.stop = f"{self._config.base_url}: {fault}. {fault.advice}"
        self.reasons[str(fault)] += 1
        return None

    def _if_there_is_time(self, fault: "_FaultError") -> "_FaultError":
        """The fault, or a final one where the server asks for a pause that outlasts the step."""
        if time.monotonic() + fault.pause_s <= self._ends:
            return fault
        what = (
            f"{fault}, and the server asks to wait {fault.pause_s:.0f} s, longer than what is left of "
            f"step_timeout_s={self._config.step_timeout_s:g}"
        )
        return _FaultError(what, final=True, stops=fault.stops, advice=fault.advice)

    async def _try(self, api: openai.AsyncOpenAI, seed: int, call: Call) -> Reply:
        """One attempt. Raises _FaultError saying what went wrong and what that means."""
        limit = self._config.request_timeout_s
        may_have_cost = False
        most = (call.most_prompt_tokens, call.most_completion_tokens)
        try:
            async with asyncio.timeout(limit):
                text = await _post(api, self._config.model, seed, call)
            return read_reply(text, call)
        except (TimeoutError, openai.APITimeoutError):
            may_have_cost = True
            raise _FaultError(f"no reply within request_timeout_s={limit:g}") from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            if cause == "ConnectError":
                advice = "Is it running, is base_url right? Start it and resume: nothing is paid twice"
                raise _FaultError("no connection", stops=True, advice=advice) from None
            may_have_cost = True
            raise _FaultError(f"the connection broke ({cause})") from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except asyncio.CancelledError:
            may_have_cost = True
            raise
        except BadReplyError as error:
            may_have_cost = True
            most = (max(most[0], error.prompt_tokens), max(most[1], error.completion_tokens))
            raise _FaultError(str(error), final=error.final) from None
        finally:
            if may_have_cost:
                # the server may have written it all: the budget counts the most it can have cost
                self._book.spend(prompt_tokens=most[0], completion_tokens=most[1])
                self._counts["prompt_tokens"] += most[0]
                self._counts["completion_tokens"] += most[1]

    def _status(self, error: openai.APIStatusError) -> "_FaultError":
        status = error.status_code
        said = error.response.text
        if self._key:
            said = said.replace(self._key, "[key]")  # before the cut, which would leave a part of it
        said = " ".join(said.split())[:200]
        if status == 429:
            advice = "Lower concurrency or wait, then resume: nothing is paid twice"
            return _FaultError(
                "too many requests (HTTP 429)", pause_s=_retry_after(error.response.headers), stops=True, advice=advice
            )
        if status in {408, 409, 425} or status >= 500:
            return _FaultError(f"HTTP {status}", pause_s=_retry_after(error.response.headers))
        if status in REFUSED_QUESTIONS:
            return _FaultError(f"HTTP {status}: {said}", final=True)
        if status in {401, 403}:
            advice = f"Check the key in the environment variable that api_key_env names ({self._config.api_key_env})"
        else:
            advice = "The server refuses what this recipe asks for"
        return _FaultError(f"HTTP {status}: {said}", final=True, stops=True, advice=advice)

    async def _afford(self, call: Call) -> bool:
        """Whether this call can be sent without any chance of passing a budget. Waits for what is under way to settle first."""
        async with self._settled:
            while True:
                if self.stop is not None:
                    return False
                passed = self._passed(call)
                if passed is None:
                    self._book.spend(requests=1)
                    self._move(call, 1)
                    return True
                if not self._under_way["requests"]:
                    self.stop = (
                        f"{self._config.base_url}: the next request could pass {passed}. Raise it and resume, or stop "
                        "here: the last checkpoint has all that was learned, and nothing is paid twice"
                    )
                    return False
                await self._settled.wait()

    def _passed(self, call: Call) -> str | None:
        """The budget that this call could pass, as text."""
        config = self._config
        requests, prompt, completion = self._book.spent()
        prompt += self._under_way["prompt_tokens"] + call.most_prompt_tokens
        completion += self._under_way["completion_tokens"] + call.most_completion_tokens
        would = amounts(config, requests + 1, prompt, completion)
        for name, value, limit in zip(BUDGETS, would, self._limits, strict=True):
            if limit is not None and value > limit:
                return f"{name}={getattr(config, name)}"
        return None

    async def _settle(self, call: Call) -> None:
        self._move(call, -1)
        async with self._settled:
            self._settled.notify_all()

    def _move(self, call: Call, sign: int) -> None:
        self._under_way["requests"] += sign
        self._under_way["prompt_tokens"] += sign * call.most_prompt_tokens
        self._under_way["completion_tokens"] += sign * call.most_completion_tokens


class _FaultError(Exception):
    """One failed attempt: how long the server asks to pause, whether to try again, whether to stop the run after the last one."""

    def __init__(
        self, what: str, *, pause_s: float = 0.0, final: bool = False, stops: bool = False, advice: str = ""
    ) -> None:
        super().__init__(what)
        self.pause_s = pause_s
        self.final = final
        self.stops = stops
        self.advice = advice


def _in_thread(work: Coroutine[Any, Any, _Outcome]) -> _Outcome:
    """What `work` returns, from an event loop in a thread of its own."""
    result: Future[_Outcome] = Future()

    def run() -> None:
        try:
            result.set_result(asyncio.run(work))
        except BaseException as error:  # whatever it is, the caller has to hear of it
            result.set_exception(error)

    # a daemon, so that a second Ctrl-C does not wait for the replies under way
    threading.Thread(target=run, name="teacher", daemon=True).start()
    return result.result()


async def _post(api: openai.AsyncOpenAI, model: str, seed: int, call: Call) -> str:
    """The reply's body. What the official client has no argument for goes along as an extra field."""
    resource = api.completions if call.endpoint == "completions" else api.chat.completions
    key = "prompt" if call.endpoint == "completions" else "messages"
    rest = {name: value for name, value in call.body.items() if name != key}
    raw = await resource.with_raw_response.create(  # type: ignore[arg-type]
        model=model, **{key: call.body[key]}, extra_body=rest | {"seed": seed}
    )
    return raw.text if isinstance(raw.text, str) else raw.text()


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds the server asks to wait, by a number or a date; 0 if it does not."""
    value = headers.get("retry-after")
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _read_key(config: ServerTeacherConfig) -> str | None:
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(f"api_key_env names the environment variable {config.api_key_env}, which is not set")
    return key
