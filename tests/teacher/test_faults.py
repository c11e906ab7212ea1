"""Random faults of a real server: every response is right, lost or refused with a message, and all of them are booked.

`python scripts/server_faults.py 1000` runs more of the same.
"""

import contextlib
import json
import random
import socket
import sqlite3
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oprd.errors import OprdError
from oprd.teacher import transport
from oprd.teacher.exchange import Request, ServerSection, Tokens
from oprd.teacher.transport import Transport

LENGTH = 8


def text_for(prompt: str) -> str:
    """The right answer."""
    return f"{zlib.crc32(prompt.encode()):x}"


def right_body(prompt: str) -> bytes:
    choice = {"text": text_for(prompt), "finish_reason": "stop", "index": 0}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()


def damaged(body: bytes, draw: random.Random) -> bytes:
    """JSON of another shape: a value replaced by something else, or a key taken away."""
    tree = json.loads(body)
    inner = draw.choice([tree, tree["choices"][0], tree["usage"]])
    key = draw.choice(sorted(set(inner) - {"text"}))
    values = [None, [], {}, -1, 10**40, 1e308, "x", "\ud800", True, [[]], float("nan"), {"text": "x"}]
    if draw.random() < 0.3:
        del inner[key]
    else:
        inner[key] = draw.choice(values)
    return json.dumps(tree).encode()


def http(status: int, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body


STATUSES = (204, 301, 307, 400, 401, 402, 404, 408, 409, 413, 422, 425, 429, 451, 500, 501, 502, 503, 504, 520, 599)
FAULTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "status": lambda body, draw: http(draw.choice(STATUSES), b'{"error": "no"}'),
    "status with the right body": lambda body, draw: http(draw.choice(STATUSES[3:]), body),
    "Retry-After": lambda body, draw: http(
        503, b"", f"Retry-After: {draw.choice(['0', '-1', 'soon', 'nan', '1e400'])}"
    ),
    "cut body": lambda body, draw: http(200, body[: draw.randrange(len(body))], length=len(body)),
    "cut at its length": lambda body, draw: http(200, body[: draw.randrange(len(body))]),
    "cut header": lambda body, draw: http(200, body)[: draw.randrange(1, 40)],
    "other JSON": lambda body, draw: http(200, damaged(body, draw)),
    "noise": lambda body, draw: http(200, draw.randbytes(200)),
    "no HTTP": lambda body, draw: draw.randbytes(200),
    "nested": lambda body, draw: http(200, b"[" * 200_000),
    "huge": lambda body, draw: http(200, body + b" " * 3_000_000),
    "huge header": lambda body, draw: http(200, body, f"X-Much: {'x' * 200_000}"),
    "odd headers": lambda body, draw: http(
        200, body, "Content-Type: text/x; charset=idna", "X: \xff", "Content-Encoding: br"
    ),
    "two lengths": lambda body, draw: http(200, body, "Content-Length: 3"),
    "gzip that is none": lambda body, draw: http(200, body, "Content-Encoding: gzip"),
    "bad chunks": lambda body, draw: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
    "two choices": lambda body, draw: http(200, body.replace(b'"choices": [', b'"choices": [{"text": "a"}, ')),
    "withheld": lambda body, draw: http(200, body.replace(b'"stop"', b'"content_filter"')),
    "nothing": lambda body, draw: b"",
}
"""What is sent in place of the right response. `slow`, `silent` and `reset` come besides."""


class Wild:
    """A server that answers a share of its requests in some way of its own."""

    def __init__(self, seed: int, share: float) -> None:
        self.draw, self.share, self.lock = random.Random(seed), share, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.requests, self.seen, self.stopped = 0, Counter[str](), threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=self.listener.accept()[:1], daemon=True).start()

    def _answer(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += (part := peer.recv(65536))
                if not part:
                    return
            head, _, body = received.partition(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            while len(body) < length:
                body += peer.recv(65536)
            right = right_body(json.loads(body)["prompt"])
            with self.lock:
                self.requests += 1
                faulty = self.draw.random() < self.share
                kind = self.draw.choice([*FAULTS, "slow", "silent", "reset"]) if faulty else "right"
                answer = FAULTS[kind](right, self.draw) if kind in FAULTS else http(200, right)
                self.seen[kind] += 1
            if kind == "reset":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif kind == "silent":
                self.stopped.wait(30)
            elif kind == "slow":
                for at in range(0, len(answer), 10):
                    peer.sendall(answer[at : at + 10])
                    self.stopped.wait(0.2)
            else:
                peer.sendall(answer)


@contextlib.contextmanager
def wild(seed: int, share: float) -> Iterator[Wild]:
    server = Wild(seed, share)
    try:
        yield server
    finally:
        server.stopped.set()
        server.listener.close()


def campaign(folder: Path, requests: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """What came of so many requests, ten a step; and how often the server did what."""
    found: Counter[str] = Counter()
    with wild(seed, share=0.6) as server:
        options = {"base_url": server.url, "model": "m", "timeout_s": 1.0, "step_timeout_s": 60.0, "max_retries": 1}
        account = ("run", "", 0)
        for step in range(requests // 10):
            prompts = [f"{seed} {step} {i}" for i in range(10)]
            chains = [
                [
                    Request(
                        endpoint="completions", body={"prompt": prompt, "max_tokens": LENGTH}, samples=1,
                        upper_bound=Tokens(len(prompt), LENGTH),
                    )
                ]
                for prompt in prompts
            ]  # fmt: skip
            found["tried"] += 10
            try:
                asked = Transport(ServerSection(**options), cache=folder / "cache.sqlite", account=account)
                rows = asked.send(chains)
            except OprdError as error:
                found["refused" if server.url in str(error) else f"without the address: {error}"[:300]] += 10
                continue
            except BaseException as error:
                found[f"traceback: {error!r}"[:300]] += 1
                continue
            for prompt, (response,) in zip(prompts, rows, strict=True):
                if response is None:
                    found["lost"] += 1
                else:
                    found["right" if response.texts == (text_for(prompt),) else "silent"] += 1
        with sqlite3.connect(folder / "cache.sqlite") as database:
            booked, _, completion = database.execute("SELECT requests, prompt, completion FROM usage").fetchone()
            kept = database.execute("SELECT COUNT(*) FROM responses").fetchone()[0]
        found["sent"], found["booked"], found["tokens"], found["kept"] = server.requests, booked, completion, kept
        return found, server.seen


@pytest.mark.slow
def test_whatever_a_server_sends_is_right_lost_or_refused_and_booked(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "MAX_LOST_SHARE", 1.0)
    found, seen = campaign(tmp_path, 60, seed=0)
    known = {"tried", "right", "lost", "refused", "sent", "booked", "tokens", "kept"}
    assert set(found) <= known
    assert found["right"] + found["lost"] + found["refused"] == found["tried"] == 60
    assert found["right"] >= 10
    assert len(seen) > 12
    # an attempt can be booked that no longer reaches the server, never the other way round
    assert found["booked"] >= found["sent"]
    assert found["tokens"] >= 4 * found["kept"]
