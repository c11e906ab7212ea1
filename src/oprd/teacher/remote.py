"""A teacher that runs elsewhere, behind `oprd serve-teacher`: its hidden states come over HTTP."""

import base64
import tempfile
import time
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, cast, final

import httpx2
import torch
from pydantic import ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from oprd.errors import ConfigError, ServerError
from oprd.files import read_json, write_json
from oprd.models.families import logit_rule
from oprd.models.language_model import LanguageModel, Model
from oprd.models.loading import ModelFacts, missing_in_common, without_weights
from oprd.models.pretrained import load_tokenizer, read_config, read_generation_config, shapes_only
from oprd.section import Listed, NonNegativeInt, Rate
from oprd.teacher.base import Teacher, TeacherConfig, TeacherContext, TeacherFacts
from oprd.teacher.exchange import KeySection, is_address, read_key
from oprd.teacher.local import LOCAL, make_local
from oprd.teacher.wire import About, Asked
from oprd.types import Batch, Capability, HiddenStates, LMHead, Taps

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Between two attempts; doubled each time. Those of the `openai` package, as for teacher `server`."""


class RemoteTeacherConfig(TeacherConfig, KeySection):
    """A frozen model behind `oprd serve-teacher`, on other machines."""

    type: Literal["remote"] = "remote"
    urls: Listed[str]
    """Servers of one model, `http://host:8500`, asked in turn; where one fails the next is asked."""
    timeout_s: Rate = 600.0
    """Of one request."""
    max_retries: NonNegativeInt = 60
    """Of one request, with pauses of 0.5 s, doubled up to 8 s: a server that is started again is waited for."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"urls", "api_key_env", "timeout_s", "max_retries"})

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not is_address(url):
                raise ValueError(
                    f"urls must look like http://host:8500, without a password, ? or # in them; got {url!r}"
                )
        if not urls:
            raise ValueError("urls must name at least one server")
        return tuple(url.rstrip("/") for url in urls)

    @property
    def longest_wait_s(self) -> float:
        return self.timeout_s + LONGEST_PAUSE_S * self.max_retries

    def facts(self, context: TeacherContext) -> TeacherFacts:
        found = Servers(self).agree(context)
        why_not = {**missing_in_common(context.student, found.facts), Capability.TEXT: "it gives hidden states alone"}
        return TeacherFacts(provides=LOCAL.difference(why_not), why_not=why_not, model=found.facts)

    def build(self, facts: TeacherFacts, context: TeacherContext, name: str = "") -> Teacher:
        servers = Servers(self)
        found = servers.agree(context)
        if lacking := {spec.block for spec in context.needs.taps.hidden} - {"last", *found.about.blocks}:
            raise ConfigError(
                f"{self.urls[0]} does not serve block {min(map(str, lacking))}; start it with --blocks all"
            )
        file = context.cache.with_name(f"remote_teacher{name and f'-{name}'}.json")
        aligned = Capability.SAME_TOKENIZER not in facts.provides
        lm = LanguageModel(
            model=found.model, tokenizer=found.facts.tokenizer, name=found.about.name, computes_on=context.device,
            pair_stops=() if aligned else context.pair_stops, weights=found.about.weights,
        )  # fmt: skip
        _same_as_before(file, found.about, write=context.rank == 0)
        teacher = make_local(RemoteModel(lm, servers, found.about), facts, context, self.chat_template_kwargs)
        # diagnostics compare all blocks or the last one
        teacher.same_shape = teacher.same_shape and len(found.about.blocks) == found.facts.blocks
        return teacher


class Found(NamedTuple):
    """What servers have said of their model."""

    about: About
    facts: ModelFacts
    model: Any
    """Without weights."""


@final
class Servers:
    """Sends requests, each to the next server that answers."""

    def __init__(self, config: RemoteTeacherConfig) -> None:
        self._config, self._next, self.count = config, 0, len(config.urls)
        key = read_key(config.api_key_env)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_keepalive_connections=0)  # a server that was started again has none of the old ones
        self._client = httpx2.Client(headers=headers, timeout=config.timeout_s, limits=limits, follow_redirects=False)

    def agree(self, context: TeacherContext) -> Found:
        """What all servers say of their model. Raises ServerError where one cannot be asked, or has another model."""
        found = [self._about(url) for url in self._config.urls]
        for url, about in zip(self._config.urls, found, strict=True):
            if about.fingerprint != found[0].fingerprint:
                raise ServerError(
                    f"{url} has other weights or another tokenizer than {self._config.urls[0]}; all must serve one model"
                )
        self._next = context.rank
        return _unpacked(found[0])

    def _about(self, url: str) -> About:
        answer = self._send(url, "GET", "/about", None)
        try:
            return About.model_validate_json(answer.content)
        except ValidationError as error:
            raise ServerError(
                f"{url} is no server of `oprd serve-teacher`, or of another version: {error.errors()[0]['msg']}"
            ) from None

    def ask(self, method: str, path: str, body: str | None = None) -> httpx2.Response:
        """The answer of the next server that gives one."""
        urls, pause, why = self._config.urls, FIRST_PAUSE_S, ""
        for attempt in range(self._config.max_retries + 1):
            url = urls[self._next % len(urls)]
            self._next += 1
            try:
                return self._send(url, method, path, body)
            except _TryAgain as error:
                why = str(error)
            if attempt % len(urls) == len(urls) - 1:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        raise ServerError(
            f"{why}; tried {self._config.max_retries + 1} times. Start it again and resume: the last step is saved"
        )

    def _send(self, url: str, method: str, path: str, body: str | None) -> httpx2.Response:
        try:
            answer = self._client.request(
                method, url + path, content=body, headers={"content-type": "application/json"} if body else {}
            )
        except httpx2.HTTPError as error:
            _unreachable(url, f"does not answer ({type(error).__name__})", final=path == "/about")
        if answer.status_code >= 500:
            _unreachable(url, f"answers HTTP {answer.status_code}", final=path == "/about")
        if not answer.is_success:
            said = " ".join(answer.text.split())[:300]
            raise ServerError(f"{url} refuses: HTTP {answer.status_code}: {said}")
        return answer


class _TryAgain(Exception):
    """A server is away or busy."""


def _unreachable(url: str, what: str, *, final: bool) -> NoReturn:
    if final:
        raise ServerError(f"{url} {what}. Is `oprd serve-teacher` running there, is the address right?") from None
    raise _TryAgain(f"{url} {what}") from None


@final
class RemoteModel(Model):
    """Hidden states from servers, whose weights are as they were at the start."""

    def __init__(self, lm: LanguageModel, servers: Servers, about: About) -> None:
        self.lm, self._servers, self._about = lm, servers, about
        self._width: int = lm.core.config.get_text_config().hidden_size
        self._fetched: LMHead | None = None

    def hidden(self, batch: Batch, taps: Taps) -> HiddenStates:
        """Hidden states in bfloat16; the servers share the rows."""
        if shapes_only():
            rows = [len(batch.positions(spec.tokens)) for spec in taps.hidden]
            states = [torch.empty(n, self._width, dtype=torch.bfloat16, device=self.lm.device) for n in rows]
        else:
            # threads of a ThreadPool are daemons, so Ctrl-C does not wait for them
            with ThreadPool(self._servers.count) as pool:
                parts = pool.map(lambda rows: self._ask(batch, taps, rows), self._shares(batch), chunksize=1)
            states = [torch.cat(x).to(self.lm.device) for x in zip(*parts, strict=True)]
        hidden = dict(zip(taps.hidden, states, strict=True))
        return HiddenStates(hidden=hidden, head=self._head() if taps.head else None, batch=batch)

    def _shares(self, batch: Batch) -> list[range]:
        """Rows for each request: about as many tokens for each server, and no more than it reads at once."""
        sizes = [p + n for p, n in zip(batch.prompt_lengths, batch.completion_lengths, strict=True)]
        most = min(self._about.max_tokens, -(-sum(sizes) // self._servers.count))
        shares, start, tokens = list[range](), 0, 0
        for row, size in enumerate(sizes):
            if row > start and tokens + size > most:
                shares.append(range(start, row))
                start, tokens = row, 0
            tokens += size
        return [*shares, range(start, len(sizes))]

    def _ask(self, batch: Batch, taps: Taps, rows: range) -> list[Tensor]:
        asked = Asked.of(batch, taps, self._about.fingerprint, rows)
        expected = [
            (len(asked.batch(pad_id=0, device=torch.device("cpu")).positions(s.tokens)), self._width)
            for s in taps.hidden
        ]
        answer = self._servers.ask("POST", "/hidden", asked.model_dump_json())
        found = _tensors(answer)
        states = [found.get(str(number)) for number in range(len(expected))]
        if [None if x is None else tuple(x.shape) for x in states] != expected:
            raise ServerError(f"{answer.url} sent hidden states of other shapes than were asked for")
        return cast(list[Tensor], states)

    def _head(self) -> LMHead:
        """The LM head, fetched once."""
        if self._fetched is None:
            vocabulary = self.lm.core.config.get_text_config().vocab_size
            if shapes_only():
                weight = torch.empty(vocabulary, self._width, dtype=torch.bfloat16, device=self.lm.device)
                return LMHead(weight=weight)
            answer = self._servers.ask("GET", "/head")
            tensors = {name: x.to(self.lm.device) for name, x in _tensors(answer).items()}
            scale, softcap = logit_rule(self.lm.core.config)
            self._fetched = LMHead(
                weight=tensors["weight"],
                bias=tensors.get("bias"),
                scale=scale,
                softcap=softcap,
                stops=self.lm.pair_stops,
            )
        return self._fetched

    def generate(self, **kwargs: Any) -> Any:
        raise ServerError("a remote teacher gives hidden states alone; use teacher `server` for text")

    def weights(self) -> dict[str, Tensor]:
        raise ServerError("a remote teacher's weights stay where they are")


def _tensors(answer: httpx2.Response) -> dict[str, Tensor]:
    try:
        return load(answer.content)
    except SafetensorError as error:
        raise ServerError(f"{answer.url} sent a broken body: {error}") from None


def _unpacked(about: About) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in about.files.items():
            Path(folder, Path(name).name).write_bytes(base64.b64decode(content))
        model = without_weights(read_config(folder))
        cast(Any, model).generation_config = read_generation_config(folder)
        facts = ModelFacts.read(cast(Any, model), load_tokenizer(folder))
    return Found(about, replace(facts, name=about.name), model)


def _same_as_before(file: Path, about: About, *, write: bool) -> None:
    """Raise ServerError if the run began with another model. `write`: keep which one it is."""
    before = read_json(file)["fingerprint"] if file.exists() else about.fingerprint
    if before != about.fingerprint:
        raise ServerError(
            f"teacher {about.name} has other weights or another tokenizer than the run began with; serve that one again, or "
            "begin a new run"
        )
    if write and not file.exists():
        write_json(file, {"fingerprint": about.fingerprint})
