"""Real servers for the tests: `transformers serve` in a process, and a small server of ours that can misbehave.

Both run the miniature teacher, on the loopback, on a port of their own.
"""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from conftest import MODELS, ROOT, load_miniature
from oprd.data.chat import encode, render
from oprd.models.loading import ModelFacts
from oprd.student import InitialStudent
from oprd.teacher.base import Needs, Teacher, TeacherContext
from oprd.teacher.server import ServerTeacherConfig
from oprd.types import Message, Prompt, Rollouts, Taps

TEACHER = MODELS / "teacher"
START_TIMEOUT_S = 300.0


def served(url: str, **changes) -> dict[str, object]:
    return {
        "type": "server",
        "base_url": url,
        "model": "teacher",
        "tokenizer": str(TEACHER),
        "max_retries": 2,
        "timeout_s": 60.0,
    } | changes


def metrics(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def teacher_context(folder: Path, **needs) -> TeacherContext:
    """What a run in `folder` with the miniature as student builds its teacher from."""
    return TeacherContext(
        student=ModelFacts.read(str(TEACHER)),
        initial_student=InitialStudent(),
        needs=Needs(
            **{"taps": Taps(), "text": False, "continues": False, "logprobs": False, "top_k": 0, "diagnostics": False}
            | needs
        ),
        device=torch.device("cpu"), sharded=False, rank=0, world_size=1, seed=0, cache_tokens=2048, packing=False,
        cache=folder / "teacher_cache.sqlite",
    )  # fmt: skip


def connect(config: ServerTeacherConfig, folder: Path, prompt: str = "12+34-5", **needs) -> Teacher:
    """The teacher of such a run, checked with one prompt."""
    context = teacher_context(folder, **needs)
    facts = config.facts(context)
    row = Prompt(row=0, messages=(Message(role="user", content=prompt),), token_ids=(1,))
    return config.build(facts, replace(context, prompts=tuple(config.render([row], facts, 0))))


def given_rollouts(tokenizer) -> Rollouts:
    """Three completions, one of them empty, of prompts rendered for a teacher with this tokenizer."""
    texts, questions = ["12+34=46\n46-5=41", "", "3"], ["12+34-5", "1+2", "1+2"]
    turns = [(Message(role="user", content=text),) for text in questions]
    prompts = tuple(
        Prompt(row=i, messages=turn, token_ids=ids, teacher_messages=turn, teacher_token_ids=ids)
        for i, (turn, ids) in enumerate((turn, render(tokenizer, turn)) for turn in turns)
    )
    return Rollouts(
        prompts=prompts, completion_ids=tuple(encode(tokenizer, text) for text in texts), finished=(True,) * 3
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """`transformers serve MODEL` until the end of the block; its base_url."""
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    arguments = [
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=out, stderr=out)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=30)


@contextlib.contextmanager
def vllm_serve(model: Path, log: Path) -> Iterator[str]:
    """vLLM's server in its own environment (`make test-vllm` makes it); its base_url. The model is called `teacher`."""
    python, port = ROOT / ".venv-vllm" / "bin" / "python", free_port()
    options = {
        "--model": model, "--served-model-name": "teacher", "--host": "127.0.0.1", "--port": port,
        "--dtype": "float32", "--max-model-len": 256, "--max-logprobs": 20,
    }  # fmt: skip
    arguments = [str(part) for option in options.items() for part in option]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments, "--enforce-eager"],
            stdout=out, stderr=out, env=environment,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")


@dataclass(frozen=True)
class Body:
    """A fault: this reply in place of the server's own."""

    content: bytes
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class FaultyServer:
    """OpenAI-compatible completions of the miniature teacher by transformers' generate, with faults on demand.

    `fault(number)` is asked for each request, counted from 1, and names one of the handler's faults or gives None.
    `generated` counts the replies that went out whole, `prompts` has those of the chat endpoint in full; equal requests get
    equal replies, as the seed is in them. `times` are those at which requests came. `retry_after` goes with 429 and 503. With
    a `certificate` it speaks TLS.
    """

    def __init__(
        self, fault: Callable[[int], "str | Body | None"] = lambda number: None, *, certificate: Path | None = None
    ) -> None:
        self.fault, self.certificate = fault, certificate
        self.requests = 0
        self.generated: list[str] = []
        self.prompts: list[str] = []
        self.headers: list[str] = []
        self.all_headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.retry_after = "0.05"
        self.lock = threading.Lock()
        self.lm = load_miniature("teacher")
        self.release = threading.Event()
        self.port = free_port()
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self.port}/v1"

    def start(self) -> "FaultyServer":
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # clients that are killed
        if self.certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self.certificate)
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Refuse connections from here on, until `start`."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def restart(self) -> None:
        """Refuse connections for a moment."""
        self.stop()
        time.sleep(0.5)
        self.start()

    def __enter__(self) -> "FaultyServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.stop()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests += 1
            self.headers.append(handler.headers.get("Authorization", ""))
            self.all_headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.times.append(time.monotonic())
            fault = self.fault(self.requests)
        if isinstance(fault, Body):
            return _send(handler, fault.status, fault.content, fault.headers)
        if fault in {"429", "503"}:
            return _send(handler, int(fault), b'{"error": "slow down"}', {"Retry-After": self.retry_after})
        if fault in {"500", "504"}:
            return _send(handler, int(fault), b'{"error": "oops"}')
        if fault in {"401", "401, at length"}:
            filler = "x" * 165 if fault == "401, at length" else ""
            said = {"error": f"{filler}bad key: {handler.headers['Authorization']}"}
            return _send(handler, 401, json.dumps(said).encode())
        if fault in {"400", "404", "413", "422"}:
            return _send(handler, int(fault), b'{"error": "this is too long for me"}')
        if fault == "hang":
            self.release.wait(30)
            handler.close_connection = True
            return None
        if fault == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
            with contextlib.suppress(OSError):
                while not self.release.wait(0.05):
                    handler.wfile.write(b" ")
            handler.close_connection = True
            return None
        if fault == "not json":
            return _send(handler, 200, b"<html>gateway</html>")
        if fault == "wrong json":
            return _send(handler, 200, b'{"choices": [{"txt": 1}]}')
        if fault == "empty":
            return _send(handler, 200, b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}')
        if fault == "die":
            handler.close_connection = True
            threading.Thread(target=self.stop, daemon=True).start()
            return None
        if fault == "restart":
            handler.close_connection = True
            threading.Thread(target=self.restart, daemon=True).start()
            return None
        with self.lock:  # one generation at a time: torch's generator is global
            reply = self.reply(handler.path, body)
        if fault == "fewer":
            reply["choices"] = reply["choices"][:-1]
        if fault and fault.startswith("ends: "):
            reason = json.loads(fault.removeprefix("ends: "))
            reply["choices"] = [choice | {"finish_reason": reason} for choice in reply["choices"]]
        if fault == "longer":
            reply["usage"]["completion_tokens"] += 1000
        content = json.dumps(reply).encode()
        if fault == "cut":
            return _send(handler, 200, content, cut=len(content) // 2)
        with self.lock:
            self.generated.append(json.dumps(body, sort_keys=True))
        return _send(handler, 200, content)

    def reply(self, path: str, body: dict) -> dict:
        tokenizer = self.lm.tokenizer
        chat = path.endswith("/chat/completions")
        if chat:
            go_on = body.get("continue_final_message", False)
            prompt = tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=not go_on, continue_final_message=go_on,
                **body.get("chat_template_kwargs", {}),
            )  # fmt: skip
            self.prompts.append(prompt)
        else:
            prompt = body["prompt"]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        n = body.get("n", 1)
        greedy = body.get("temperature", 1.0) == 0
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(body["seed"])
            out = self.lm.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                do_sample=not greedy,
                top_k=None if greedy else 0,
                num_return_sequences=n,
                pad_token_id=tokenizer.pad_token_id,
            )[:, len(ids) :].tolist()
            choices = [self._choice(row, chat) for row in out]
        if "prompt_logprobs" in body:
            self._score(choices[0], ids, body["prompt_logprobs"])
        written = sum(len(row) - row.count(tokenizer.pad_token_id) for row in out)
        return {"choices": choices, "usage": {"prompt_tokens": len(ids), "completion_tokens": written}}

    def _choice(self, row: list[int], chat: bool) -> dict:
        end = self.lm.tokenizer.eos_token_id
        text = self.lm.tokenizer.decode(row, skip_special_tokens=True)
        reason = "stop" if end in row else "length"
        return {"finish_reason": reason} | ({"message": {"content": text}} if chat else {"text": text})

    def _score(self, choice: dict, ids: list[int], k: int) -> None:
        """Log-probabilities of the prompt in the form of vLLM's prompt_logprobs."""
        with torch.no_grad():
            logprobs = self.lm.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows = []
        for at in range(1, len(ids)):
            top = logprobs[at - 1].topk(k)
            row = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            rows.append(row | {ids[at]: float(logprobs[at - 1, ids[at]])})
        choice["prompt_logprobs"] = [None, *({str(i): {"logprob": x} for i, x in row.items()} for row in rows)]


def _send(
    handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict | None = None, cut: int | None = None
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content if cut is None else content[:cut])
    if cut is not None:
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)
