"""What a teacher on another machine costs: `python scripts/export_smollm2.py runs/smollm2 && python benchmarks/remote_teacher.py`.

SmolLM2-135M in float32 on one thread, 4 completions of 64 + 192 tokens: seconds of the targets by a local teacher and by
`oprd serve-teacher` on the loopback (its own process), in turn, and bytes of the response for each completion token.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import torch

from oprd.models.loading import ModelFacts
from oprd.rollout.vllm_server import free_port
from oprd.student import InitialStudent
from oprd.teacher.base import Needs, TeacherContext
from oprd.teacher.local import LocalTeacherConfig
from oprd.teacher.remote import RemoteTeacherConfig, Servers
from oprd.train.run_folder import describe_machine
from oprd.types import ALL_TOKENS, HiddenSpec, Prompt, Rollouts, Taps

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "smollm2"
OUT = ROOT / "benchmarks" / "results" / "remote_teacher.json"
COMPLETIONS, PROMPT, LENGTH, ROUNDS = 4, 64, 192, 5
LAST = Taps(hidden=(HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS),))


def rollouts() -> Rollouts:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (COMPLETIONS, PROMPT + LENGTH), generator=draw).tolist()
    prompts = [tuple(row[:PROMPT]) for row in ids]
    return Rollouts(
        prompts=tuple(Prompt(row=i, messages=(), token_ids=p, teacher_token_ids=p) for i, p in enumerate(prompts)),
        completion_ids=tuple(tuple(row[PROMPT:]) for row in ids),
        finished=(True,) * COMPLETIONS,
    )


def start(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "oprd", "serve-teacher", str(MODEL), "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        try:
            httpx2.get(f"http://127.0.0.1:{port}/about", timeout=5)
            return process
        except httpx2.HTTPError:
            time.sleep(0.5)
    raise SystemExit("the server has ended")


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    torch.set_num_threads(1)
    facts, given = ModelFacts.read(str(MODEL)), rollouts()
    every = Taps(hidden=tuple(HiddenSpec(block=b, at="token", tokens=ALL_TOKENS) for b in range(1, facts.blocks + 1)))
    received: list[int] = []
    real = Servers.ask

    def ask(self: Servers, *args: str) -> httpx2.Response:
        answer = real(self, *args)
        received.append(len(answer.content))
        return answer

    Servers.ask = ask  # type: ignore[method-assign]
    port = free_port()
    process, found = start(port), {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            needs = Needs(taps=every, text=False, continues=False, logprobs=False, top_k=0, diagnostics=False)
            context = TeacherContext(
                student=facts, initial_student=InitialStudent(), needs=needs, device=torch.device("cpu"), sharded=False,
                rank=0, world_size=1, seed=0, cache_tokens=2048, packing=False, cache=Path(folder, "cache.sqlite"),
            )  # fmt: skip
            configs = {
                "local": LocalTeacherConfig(model=str(MODEL), dtype="float32"),
                "remote": RemoteTeacherConfig(urls=(f"http://127.0.0.1:{port}",)),
            }
            teachers = {name: config.build(config.facts(context), context) for name, config in configs.items()}
            for what, taps in (("last block", LAST), ("all blocks", every)):
                rounds: dict[str, list[float]] = {name: [] for name in teachers}
                for _ in range(ROUNDS):
                    for name, teacher in teachers.items():
                        rounds[name].append(seconds(lambda teacher=teacher, taps=taps: teacher.targets(given, taps)))
                found[what] = {
                    "seconds_median": {name: round(statistics.median(all_), 3) for name, all_ in rounds.items()},
                    "remote_to_local": [
                        round(b / a, 3) for a, b in zip(rounds["local"], rounds["remote"], strict=True)
                    ],
                    "bytes_per_token": round(received[-1] / (COMPLETIONS * LENGTH)),
                }
                print(what, found[what], flush=True)
    finally:
        process.kill()
        process.wait()
    OUT.write_text(json.dumps({"result": found, **describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
