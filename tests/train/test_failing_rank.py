"""A failure on one of two processes: both stop with its message and with the last whole step saved."""

import json
from pathlib import Path

import pytest
import yaml

from conftest import miniature_recipe
from processes import TORCHRUN, run_two
from serving import FaultyServer, served
from train.runs import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = """
# `oprd train` for each recipe in turn; rank 1 fails in its second step, in the way that the job names
import contextlib, io, json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from oprd.cli import main
from oprd.plan import start
from oprd.progress import console
from oprd.rollout.hf import HFEngine
from oprd.teacher.transport import Transport

torch.set_num_threads(1)
rank, found, calls = int(os.environ["RANK"]), [], []
generate, send, free = HFEngine.generate, Transport.send, start._free_bytes

def failing_generate(self, *given, **named):
    calls.append(None)
    if len(calls) == 2 and rank == 1:
        raise RuntimeError("no memory")
    return generate(self, *given, **named)

def failing_send(self, chains):
    calls.append(None)
    if len(calls) == 2 and rank == 1:
        self._key = "withdrawn"
    return send(self, chains)

for job in json.loads(Path(sys.argv[1]).read_text()):
    HFEngine.generate, Transport.send, start._free_bytes = generate, send, free
    if job["kind"] == "engine":
        HFEngine.generate = failing_generate
    elif job["kind"] == "memory":
        start._free_bytes = lambda device: 3.5e7 if rank else 1e12
    else:
        Transport.send = failing_send
    calls.clear()
    console.file = io.StringIO()
    sys.argv[1:] = ["train", job["recipe"]]
    try:
        main()
    except SystemExit as exit:
        found.append([exit.code, " ".join(console.file.getvalue().split())])
backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
found.append(backend.options._timeout.total_seconds())
Path(__file__).with_name(f"rank-{rank}.json").write_text(json.dumps(found))
"""
OMNI = {"type": "omni_opd", "chunk_tokens": 6, "chunks": 1, "continuations": 2}
SAMPLED = {"type": "opd_sampled"}


@pytest.fixture(scope="module")
def both(tmp_path_factory, train_file):
    """By kind of failure the recipe, and what each of two ranks said in the end; and how long they wait for each other."""
    folder, trees = tmp_path_factory.mktemp("failing"), {}
    with FaultyServer(lambda _: "401" if server.headers[-1] == "Bearer withdrawn" else None) as server:
        teacher = {"teacher": served(server.url, api_key_env="TEST_KEY", max_retries=0, step_timeout_s=20_000.0)}
        kinds = {
            "log-probabilities": teacher | {"objective": SAMPLED},
            "continuations": teacher | {"objective": OMNI},
            "engine": {"objective": SAMPLED},
            "memory": {"prompts_per_step": 8},
        }
        for kind, options in kinds.items():
            options = {"health_tokens": 0, "save_steps": 100, "max_steps": 2, "prompts_per_step": 2} | options
            trees[kind] = miniature_recipe(folder / kind, train_file, **options)
            (folder / f"{kind}.yaml").write_text(yaml.safe_dump(trees[kind]))
        jobs = [{"recipe": str(folder / f"{kind}.yaml"), "kind": kind} for kind in kinds]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        (folder / "worker.py").write_text(WORKER)
        code = run_two(TORCHRUN, folder / "worker.py", folder / "jobs.json", timeout=800, TEST_KEY="valid")
    assert code == 0, (folder / "errors.txt").read_text()[-4000:]
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return {kind: (trees.get(kind), [rows[at] for rows in found]) for at, kind in enumerate([*kinds, "wait"])}


@pytest.mark.parametrize(
    ("kind", "message"),
    [("log-probabilities", "HTTP 401: "), ("continuations", "HTTP 401: "), ("engine", "RuntimeError: no memory")],
)
def test_what_fails_on_one_rank_stops_both_with_its_message_and_the_step_saved(kind, message, both):
    tree, ended = both[kind]
    for code, said in ended:
        assert code == 3
        assert message in said
    folder = Path(tree["output_dir"])
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    assert (folder / "checkpoints" / "step-000001" / "SHA256SUMS").is_file()


def test_a_rank_with_too_little_memory_stops_both_before_anything_is_loaded(both):
    tree, ended = both["memory"]
    for code, said in ended:
        assert code == 2
        assert "DoesNotFit: the run needs more memory than there is" in said
    assert not Path(tree["output_dir"]).exists()


def test_ranks_wait_for_each_other_longer_than_for_a_server(both):
    _, waits = both["wait"]
    assert min(waits) > 20_000
