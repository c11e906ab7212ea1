"""Requests to an OpenAI-compatible server: many at once, retried, never paid twice, never beyond the budget."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing, closing, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, final

import httpx2
import openai

from oprd.errors import ConfigError, OprdError, ServerError
from oprd.teacher.exchange import Failure, Request, Response, ServerSection, Tokens, UsageLog, read_key, read_response
from oprd.types import Metric

MAX_LOST_SHARE = 0.1
"""Above this share of lost requests in a step the run stops instead of training on the rest."""
ONE_REQUEST = frozenset({400, 408, 409, 413, 422})
"""Statuses that concern one request, such as one too long for the server; other 4xx concern every request."""
UNKNOWN_OUTCOME = frozenset({408, 502, 504})
"""Statuses after which the model may have generated everything all the same."""
ADVICE = {
    **dict.fromkeys(range(300, 400), "It redirects to another address; if you trust that one, give it as base_url"),
    **dict.fromkeys((401, 403), "Check the key in the environment variable that api_key_env names ({api_key_env})"),
    429: "Lower concurrency or wait, then resume: nothing is paid twice",
}
NO_CONNECTION = "Is it running, is base_url right? Start it and resume: nothing is paid twice"
NO_TRUST = "Give the certificate of the authority that signed it in a file that SSL_CERT_FILE names, and resume"


@dataclass(slots=True)
class _Draft:
    """A request under way, its key in the cache (None: past it) and its seed; then its response, or the last failure."""

    request: Request
    key: str | None
    seed: int
    response: Response | None = None
    failure: Failure | None = None


@final
class Transport:
    """Sends the requests of a step; one for each teacher and process. `account`: its row in the usage log."""

    def __init__(
        self, server: ServerSection, *, cache: Path, account: tuple[str, str, int], world_size: int = 1, seed: int = 0
    ) -> None:
        self._server, self._cache, self._account, self._seed = server, cache, account, seed
        self._key = read_key(server.api_key_env) or "none"
        self._counts: Counter[str] = Counter()
        cache.parent.mkdir(parents=True, exist_ok=True)
        with closing(UsageLog(cache, account)) as log:
            own, everyone = server.amounts(*log.spent()), server.amounts(*log.spent(by_all=True))
        # an equal part of what is left, so that no rank has to know what the others spend from here on
        self._limits = {
            name: own[name] + (limit - everyone[name]) / world_size for name in own if (limit := getattr(server, name))
        }

    def send(self, chains: Sequence[Sequence[Request]]) -> list[list[Response | None]]:
        """The response to every request, None where it was lost. Requests of a chain go one after the other.

        Raises ServerError when nothing more can be had or paid, or too many were lost; those under way are waited for.
        """
        server, rows = self._server, self._run(chains, self._counts, cached=True)
        late = f"no response within step_timeout_s={server.step_timeout_s:g}"
        lost = Counter(str(draft.failure or late) for row in rows for draft in row if draft.response is None)
        total, asked = lost.total(), sum(map(len, chains))
        self._counts["lost"] += total
        if total > MAX_LOST_SHARE * asked:
            why = ", ".join(f"{count} x {reason}" for reason, count in lost.most_common(3))
            raise ServerError(
                f"{server.base_url}: {total} of {asked} responses of this step were lost ({why}); allowed is a share of "
                f"{MAX_LOST_SHARE}. Look at the server's log, then resume: what was answered is kept"
            )
        return [[draft.response for draft in row] for row in rows]

    def probe(self, request: Request, *, advice: str) -> Response:
        """The server's response of today, past the cache, for the checks at start. Raises ServerError with the advice."""
        ((draft,),) = self._run([[request]], Counter(), cached=False)
        if draft.response is None:
            failed = f"does not answer a check at start as it should: {draft.failure}"
            raise ServerError(f"{self._server.base_url} {failed}. {advice}")
        return draft.response

    def metrics(self) -> tuple[Metric, ...]:
        """What was sent since the last call."""
        counts, self._counts = self._counts, Counter()
        names = ("requests", "retries", "cache_hits", "lost", "prompt_tokens", "completion_tokens")
        values = {name: float(counts[name]) for name in names}
        values["cost"] = self._server.amounts(0, counts["prompt_tokens"], counts["completion_tokens"])["max_cost"]
        return tuple(Metric(name=f"teacher/{name}/sum", sum=value) for name, value in values.items())

    def _run(self, chains: Sequence[Sequence[Request]], counts: Counter[str], *, cached: bool) -> list[list[_Draft]]:
        seen: Counter[str] = Counter()
        drafts = [[self._draft(request, seen, cached=cached) for request in chain] for chain in chains]
        # a notebook's thread has a loop already; threads of a ThreadPool are daemons, so Ctrl-C does not wait for them
        with closing(UsageLog(self._cache, self._account)) as log, ThreadPool(1) as pool:
            step = _Step(self._server, self._key, log, self._limits, counts)
            pool.apply(lambda: asyncio.run(step.run(drafts)))
        if step.stop is not None:
            raise step.stop
        return drafts

    def _draft(self, request: Request, seen: Counter[str], *, cached: bool) -> _Draft:
        """Equal requests of one step (`seen`) are different draws."""
        # two servers can know different weights by one model name
        model = [self._server.model, self._account[1]] if self._account[1] else self._server.model
        content = json.dumps([model, request.endpoint, request.body, request.samples, self._seed], sort_keys=True)
        digest = hashlib.sha256(f"{content}#{seen[content]}".encode()).digest()
        seen[content] += 1
        seed = int.from_bytes(digest[:4], "big") >> 1  # 31 bits: what every server takes
        return _Draft(request, digest.hex() if cached else None, seed)


_DRAFT: ContextVar[_Draft] = ContextVar("draft")  # what this asyncio task is sending


class _Step(openai.DefaultAsyncHttpxClient):
    """The requests of one step. The openai client sends every attempt, retries included, through `send`."""

    def __init__(
        self, server: ServerSection, key: str, log: UsageLog, limits: Mapping[str, float], counts: Counter[str]
    ) -> None:
        try:
            super().__init__()
        except (ValueError, ImportError) as error:
            raise ConfigError(f"the proxy that HTTPS_PROXY or ALL_PROXY names cannot be used: {error}") from None
        self._server, self._key, self._log, self._limits, self._counts = server, key, log, limits, counts
        self._free, self._settled = asyncio.Semaphore(server.concurrency), asyncio.Event()
        self._under_way = 0
        self.stop: OprdError | None = None  # why nothing more is sent

    async def run(self, chains: Sequence[Sequence[_Draft]]) -> None:
        """Put a response into every draft that gets one."""
        server = self._server
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key=self._key, max_retries=server.max_retries, timeout=None, http_client=self
        ) as api:
            with suppress(TimeoutError):
                async with asyncio.timeout(server.step_timeout_s), asyncio.TaskGroup() as tasks:
                    for chain in chains:
                        tasks.create_task(self._chain(api, chain))

    async def _chain(self, api: openai.AsyncOpenAI, chain: Sequence[_Draft]) -> None:
        async with self._free:  # a chain is finished once it is begun: its prefixes come while the server has them
            for draft in chain:
                _DRAFT.set(draft)
                body = {"model": self._server.model, **draft.request.body, "seed": draft.seed}
                try:
                    draft.response = self._log.find(draft.key)
                    self._counts["cache_hits"] += draft.response is not None
                    if draft.response is None:
                        await api.post(f"/{draft.request.endpoint}", cast_to=httpx2.Response, body=body)
                except openai.OpenAIError:
                    if (failure := draft.failure) and failure.advice:
                        self.stop = self.stop or ServerError(f"{self._server.base_url}: {failure}. {failure.advice}")
                except OprdError as error:
                    self.stop = self.stop or error

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        """One attempt. Its upper bound is booked before, and corrected where it is known what it has cost."""
        draft = _DRAFT.get()
        bound = used = draft.request.upper_bound
        await self._reserve(bound)
        self._counts.update(requests=1, retries=int(draft.failure is not None))
        try:
            async with asyncio.timeout(self._server.timeout_s):
                answer = await self._receive(request, draft.request)
            if answer.is_success:
                draft.response = read_response(answer.content, draft.request)
                used = draft.response.used
            else:
                draft.failure = self._explain_status(answer, bound)
                used = draft.failure.used
            return answer
        except (Failure, TimeoutError, httpx2.RequestError) as error:
            draft.failure = self._explain(error, bound)
            used = draft.failure.used
            # the client does not retry an error of its own
            raise openai.OpenAIError if draft.failure.final else httpx2.RequestError("") from None
        finally:
            self._under_way -= 1
            self._settled.set()
            self._counts.update(prompt_tokens=used.prompt, completion_tokens=used.completion)
            correction = Tokens(used.prompt - bound.prompt, used.completion - bound.completion)
            self._log.add(0, correction, draft.key, draft.response)

    async def _receive(self, request: httpx2.Request, asked: Request) -> httpx2.Response:
        """The server's own answer: never another host's, never compressed, never larger than a response can be.

        Of the headers of the openai client and its environment variables (OPENAI_ORG_ID, ...) none is sent.
        """
        headers = {"authorization": f"Bearer {self._key}", "accept-encoding": "identity", "user-agent": "oprd"}
        headers["content-type"] = "application/json"
        request = httpx2.Request("POST", request.url, headers=headers, content=request.content)
        answer = await super().send(request, stream=True, follow_redirects=False)
        content = bytearray()
        async with aclosing(answer), aclosing(answer.aiter_raw()) as parts:
            async for part in parts:
                content += part
                if len(content) > asked.most_bytes:
                    raise Failure(f"a body of more than {asked.most_bytes} bytes", asked.upper_bound)
        pause = {name: value for name, value in answer.headers.items() if name.startswith("retry-after")}
        return httpx2.Response(answer.status_code, headers=pause, content=bytes(content), request=request)

    async def _reserve(self, bound: Tokens) -> None:
        """Book an attempt before it is sent. If it could pass a budget, wait until those under way turn out cheaper."""
        server = self._server
        while self.stop is None:
            requests, prompt, completion = self._log.spent()
            would = server.amounts(requests + 1, prompt + bound.prompt, completion + bound.completion)
            passed = [f"{name}={getattr(server, name)}" for name, limit in self._limits.items() if would[name] > limit]
            if not passed:
                self._log.add(1, bound)
                self._under_way += 1
                return
            if not self._under_way:
                raise ServerError(
                    f"{server.base_url}: the next request could pass {passed[0]}. Raise it and resume, or stop here: "
                    "the last checkpoint has all that was learned, and nothing is paid twice"
                )
            self._settled.clear()
            await self._settled.wait()
        raise self.stop

    def _explain(self, error: Exception, bound: Tokens) -> Failure:
        match error:
            case Failure():
                return Failure(self._hide_key(str(error)), error.used, final=error.final)
            case TimeoutError():
                return Failure(f"no response within timeout_s={self._server.timeout_s:g}", bound)
            case httpx2.ConnectError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
                return Failure(f"its certificate is not trusted: {error}", Tokens(0, 0), advice=NO_TRUST)
            case httpx2.ConnectError():
                return Failure("no connection", Tokens(0, 0), advice=NO_CONNECTION)
            case _:
                return Failure(f"the connection broke ({type(error).__name__})", bound)

    def _explain_status(self, answer: httpx2.Response, bound: Tokens) -> Failure:
        status, said = answer.status_code, self._hide_key(answer.content.decode(errors="replace"))
        said = f"HTTP {status}: {' '.join(said.split())[:200]}"  # cut behind the key, no part of which is left so
        if status == 429:
            said = f"too many requests, {said} (Retry-After: {answer.headers.get('retry-after', 'none')})"
        if status >= 500 or status in ONE_REQUEST:
            return Failure(said, bound if status in UNKNOWN_OUTCOME else Tokens(0, 0))
        advice = ADVICE.get(status, "The server refuses what this recipe asks for")
        return Failure(said, Tokens(0, 0), advice=advice.format(api_key_env=self._server.api_key_env))

    def _hide_key(self, said: str) -> str:
        return said.replace(self._key, "[key]") if self._server.api_key_env else said
