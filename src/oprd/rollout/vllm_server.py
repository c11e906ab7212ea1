# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false
"""One vLLM server over HTTP, and the process of one that the run has started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import httpx2

from oprd.errors import ConfigError, ServerError
from oprd.models.loading import PROBE_TEXTS, ModelFacts
from oprd.progress import console

TESTED_VERSION = "0.32"
ADAPTER = "oprd-student"
"""Name under which servers know the student's adapter."""
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Variables by which vLLM would take itself for a process of the training."""
PREFIX = re.compile(r"^\(\w+ pid=\d+\) (\w+ [\d-]+ [\d:]+ \[[^\]]*\] )?")
"""vLLM's, of a line in its log."""


class Server:
    """One vLLM server. Whatever is wrong with it is a ServerError, with its last words where the run has started it."""

    def __init__(self, url: str, timeout_s: float, process: "Process | None" = None, *, sleeps: bool = False) -> None:
        self.url, self._timeout_s, self._process, self._sleeps = url.rstrip("/"), timeout_s, process, sleeps
        self._asleep = False
        # no connection is kept: one that the server closes while the student learns would look like its death
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._client = httpx2.Client(base_url=self.url, timeout=timeout_s, limits=limits, trust_env=process is None)

    def check(self, student: ModelFacts, tokens: int) -> None:
        """Raise an OprdError unless it can be given this student's weights and write texts of so many tokens."""
        tell_if_untested(self._ask("GET", "/version")["version"])
        if not self._client.get("/server_info").is_success:
            raise ConfigError(f"vLLM at {self.url} takes no weights: start it with VLLM_SERVER_DEV_MODE=1")
        (model, *_) = self._ask("GET", "/v1/models")["data"]
        if model["max_model_len"] < tokens:
            raise ConfigError(
                f"vLLM at {self.url} writes up to {model['max_model_len']} tokens, the longest prompt and completion have "
                f"{tokens}; start it with --max-model-len {tokens}"
            )
        for text in PROBE_TEXTS:
            theirs = self._ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
            ours = list(cast(list[int], student.tokenizer(text, add_special_tokens=False)["input_ids"]))
            if ours != theirs:
                raise ConfigError(
                    f"vLLM at {self.url} serves {model['id']!r}, which splits {text!r} as {theirs}, the student as {ours}: "
                    "start it with the student's model"
                )

    def wait(self) -> None:
        """Until the server has started."""
        assert self._process is not None
        end = time.monotonic() + self._timeout_s
        while self._process.runs and time.monotonic() < end:
            with contextlib.suppress(httpx2.HTTPError):
                if self._client.get("/health", timeout=5).is_success:
                    return
            time.sleep(0.2)
        late = f" within rollout.engine.timeout_s={self._timeout_s:g} s" if self._process.runs else ""
        raise ServerError(f"vLLM did not start{late}{self._last_words()}")

    def load(self, folder: Path, *, adapter: bool) -> None:
        """Take over the weights, or the adapter, in a folder."""
        if self._asleep:
            self._ask("POST", "/wake_up?tags=weights")
        if adapter:
            body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
            self._ask("POST", "/v1/load_lora_adapter", body)
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._ask("POST", "/collective_rpc", body)
        if self._asleep:
            self._ask("POST", "/wake_up?tags=kv_cache")
            self._asleep = False
        self._ask("POST", "/reset_prefix_cache")

    def complete(self, body: Mapping[str, Any], *, adapter: bool) -> list[dict[str, Any]]:
        """The choices of one request, each with as many log-probabilities as tokens."""
        found = self._ask("POST", "/v1/completions", {"model": ADAPTER if adapter else self._model, **body})["choices"]
        whole = all(
            choice["finish_reason"] in {"stop", "length"}
            and len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"])
            for choice in found
        )
        if len(found) != body["n"] or not whole:
            raise ServerError(
                f"vLLM at {self.url} wrote {len(found)} of {body['n']} completions, or not the whole of one"
            )
        return sorted(found, key=lambda choice: choice["index"])

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the device's memory to the training."""
        if self._sleeps:
            self._ask("POST", f"/sleep?level={1 if keep_weights else 2}")
            self._asleep = True

    def close(self) -> None:
        self._client.close()
        if self._process is not None:
            self._process.stop()

    @cached_property
    def _model(self) -> str:
        return self._ask("GET", "/v1/models")["data"][0]["id"]

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            response = self._client.request(method, path, json=body)
        except httpx2.TimeoutException as error:
            raise ServerError(
                f"vLLM at {self.url} gave no answer to {path} within rollout.engine.timeout_s={self._timeout_s:g} s"
                f"{self._last_words()}"
            ) from error
        except httpx2.HTTPError as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ServerError(f"no connection to vLLM at {self.url} ({reason}){self._last_words()}") from error
        if not response.is_success:
            why = self._last_words() if response.is_server_error else ""
            raise ServerError(
                f"vLLM at {self.url} answered {path} with {response.status_code}: {response.text[:300]}{why}"
            )
        return response.json() if response.headers.get("content-type", "").startswith("application/json") else None

    def _last_words(self) -> str:
        return "; its own log says why" if self._process is None else self._process.last_words()


class Process:
    """A vLLM server that ends with this process."""

    def __init__(self, command: Sequence[str], log: Path, *, device: int | None) -> None:
        self._log = log
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        if device is None:
            environment = {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | environment
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            # a session of its own: Ctrl-C in the terminal is for the training loop, not for vLLM
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """Where its log is, and the last errors in it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)  # a server that is about to end still writes why
        lines = [PREFIX.sub("", line) for line in self._log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        causes = [line for line in errors if "(above)" not in line]  # not those that point to another
        said = "\n".join(list(dict.fromkeys(causes or errors))[-3:] or lines[-5:])
        ended = "" if self.runs else f"; its process ended with code {self._process.returncode}"
        return f"{ended}. From {self._log}:\n{said}"

    def stop(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)


def tell_if_untested(version: str) -> None:
    """Warn of a version that this program was never run with."""
    if not version.startswith(f"{TESTED_VERSION}."):
        console.print(f"[yellow]vLLM {version} is not tested with this program; {TESTED_VERSION} is.[/]")


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
