"""`oprd serve-teacher`: a model whose hidden states are read over HTTP, by teacher `remote`."""

import base64
import hashlib
import hmac
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from oprd.errors import ConfigError
from oprd.models.fingerprint import tokenizer_fingerprint, weights_fingerprint
from oprd.models.language_model import FrozenModel
from oprd.models.loading import ModelFacts, load_frozen
from oprd.models.probe import Use
from oprd.progress import console
from oprd.teacher.exchange import read_key
from oprd.teacher.wire import About, Asked, stream
from oprd.types import Taps

MOST_WAITING = 32
"""Requests that wait for the model; further ones are asked to come back."""
BYTES_PER_TOKEN = 64
"""Of a request's body, at most: an id as JSON, and where an alignment has it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a teacher is served."""

    dtype: str = "bfloat16"
    blocks: str = "all"
    max_tokens: int = 65_536
    api_key_env: str | None = None

    def chosen(self, count: int) -> tuple[int, ...]:
        """The blocks of a model of `count` whose states may be asked for. Raises ConfigError for others."""
        named = {"all": range(1, count + 1), "last": [count]}.get(self.blocks)
        try:
            found = tuple(named if named is not None else sorted({int(x) for x in self.blocks.split(",")}))
        except ValueError:
            found = (0,)
        if not 1 <= found[0] <= found[-1] <= count:
            raise ConfigError(
                f"--blocks is {self.blocks!r}; give all, last, or numbers from 1 to {count}, as in 4,8,12"
            )
        return found


@final
@dataclass(kw_only=True)
class ServedTeacher:
    """Answers with one forward pass at a time."""

    model: FrozenModel
    about: About
    context: int
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False)
    _waiting: int = field(default=0, init=False)

    @classmethod
    def load(cls, name: str, options: Options) -> "ServedTeacher":
        """Raises an OprdError for what cannot be served, before weights are loaded where that can be known."""
        facts = ModelFacts.read(name)
        blocks = options.chosen(facts.blocks)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, use = getattr(torch, options.dtype), Use(taps=Taps(head=True), text=False)
        model = load_frozen(name, facts.tokenizer, device, dtype=dtype, use=use)
        return cls(model=model, about=_about(name, model, blocks, options.max_tokens), context=facts.context)

    @property
    def busy(self) -> bool:
        return self._waiting >= MOST_WAITING

    def refuse(self, asked: Asked) -> str | None:
        """Why a request cannot be answered; None if it can."""
        lengths = [len(p) + len(c) for p, c in zip(asked.prompt_ids, asked.completion_ids, strict=False)]
        vocabulary = self.model.lm.core.config.get_text_config().vocab_size
        wrong_blocks = {self.model.lm.block_of(spec) for spec in asked.taps} - set(self.about.blocks)
        rows = {len(asked.prompt_ids), len(asked.completion_ids), len(asked.alignments or asked.prompt_ids)}
        if asked.fingerprint != self.about.fingerprint:
            return (
                f"asked for a model of fingerprint {asked.fingerprint[:16]}, this one is {self.about.fingerprint[:16]}"
            )
        if not asked.taps or not lengths or len(rows) > 1 or not all(asked.prompt_ids):
            return "needs taps, and rows that each have a prompt and, if one has, an alignment"
        if sum(lengths) > self.about.max_tokens:
            return (
                f"{sum(lengths)} tokens in one request; at most {self.about.max_tokens} are read at once (--max-tokens)"
            )
        if max(lengths) > self.context:
            return f"a row of {max(lengths)} tokens; the model's context is {self.context}"
        if wrong_blocks:
            return f"block {min(wrong_blocks)} is not served (--blocks)"
        ids = (i for rows in (asked.prompt_ids, asked.completion_ids) for row in rows for i in row)
        if not all(0 <= i < vocabulary for i in ids):
            return f"a token id that the vocabulary of {vocabulary} does not have"
        pairs = zip(asked.alignments or (), asked.completion_ids, strict=False)
        if not all(0 <= at < len(row) for one, row in pairs for at in one.teacher_index):
            return "an alignment that points outside its completion"
        return None

    def hidden(self, asked: Asked) -> dict[str, Tensor]:
        """The states of every tap by its number, [N, D], in bfloat16."""
        self._waiting += 1
        try:
            with self._turn:
                return self._read(asked)
        finally:
            self._waiting -= 1

    def head(self) -> dict[str, Tensor]:
        """Weight and bias of the LM head."""
        head = self.model.lm.head()
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        return {name: x.detach() for name, x in tensors.items()}

    def _read(self, asked: Asked) -> dict[str, Tensor]:
        lm = self.model.lm
        states = self.model.hidden(asked.batch(pad_id=lm.pad_id, device=lm.device), Taps(hidden=asked.taps))
        return {str(number): states.hidden[spec].to(torch.bfloat16) for number, spec in enumerate(asked.taps)}


def _about(name: str, model: FrozenModel, blocks: tuple[int, ...], max_tokens: int) -> About:
    lm, weights = model.lm, weights_fingerprint(model.lm)
    head = lm.head().weight.detach().to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes()
    content = [weights, hashlib.sha256(head).hexdigest(), tokenizer_fingerprint(lm.tokenizer)]
    with tempfile.TemporaryDirectory() as folder:
        for part in (lm.tokenizer, lm.core.config, lm.core.generation_config):
            if part is not None:
                part.save_pretrained(folder)
        files = {
            f.name: base64.b64encode(f.read_bytes()).decode() for f in sorted(Path(folder).iterdir()) if f.is_file()
        }
    fingerprint = hashlib.sha256("".join(content).encode()).hexdigest()
    return About(name=name, fingerprint=fingerprint, weights=weights, files=files, blocks=blocks, max_tokens=max_tokens)


def make_app(teacher: ServedTeacher, key: str) -> Any:
    """The HTTP interface: GET /about and /head, POST /hidden. Errors are JSON with a `detail`."""
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse, StreamingResponse

    app = FastAPI(title="oprd teacher", docs_url=None, redoc_url=None, openapi_url=None)
    most_bytes = 2**20 + BYTES_PER_TOKEN * teacher.about.max_tokens

    @app.middleware("http")
    async def admit(request: Request, go_on: Callable[[Request], Awaitable[Any]]) -> Any:
        sent = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            return JSONResponse({"detail": "the key is missing or wrong"}, 401)
        length = request.headers.get("content-length", "0" if request.method == "GET" else "")
        if not length.isdigit() or int(length) > most_bytes:
            return JSONResponse(
                {"detail": f"a body of {length or 'unknown'} bytes; at most {most_bytes} are read"}, 413
            )
        return await go_on(request)

    @app.get("/about")
    def about() -> About:
        return teacher.about

    @app.get("/head")
    def head() -> StreamingResponse:
        return StreamingResponse(stream(teacher.head()), media_type="application/octet-stream")

    @app.post("/hidden")
    def hidden(asked: Asked) -> StreamingResponse:
        if (why := teacher.refuse(asked)) is not None:
            raise HTTPException(409 if asked.fingerprint != teacher.about.fingerprint else 400, why)
        if teacher.busy:
            raise HTTPException(503, f"{MOST_WAITING} requests wait already", {"retry-after": "1"})
        return StreamingResponse(stream(teacher.hidden(asked)), media_type="application/octet-stream")

    return app


def serve(name: str, host: str, port: int, options: Options) -> None:
    """Load a model and answer until stopped. Raises ConfigError before that for what would let strangers in, or cannot work."""
    key = read_key(options.api_key_env, "--api-key-env")
    if not key and host not in {"127.0.0.1", "localhost", "::1"}:
        raise ConfigError(
            f"--host {host} lets others reach the teacher: give --api-key-env, whose key they have to send"
        )
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError("serve-teacher needs the packages of extra `serve`: pip install 'oprd[serve]'") from error
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(f"--port {port} of --host {host} cannot be had: {error.strerror}; give another") from error
    teacher = ServedTeacher.load(name, options)
    lm = teacher.model.lm
    console.print(f"{name}: {lm.num_blocks} blocks, on {lm.device}, at http://{host}:{port}", highlight=False)
    uvicorn.run(make_app(teacher, key), host=host, port=port, log_level="warning")
