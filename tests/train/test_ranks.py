"""Two processes under FSDP2 in bfloat16: what is read off the sharded student is not rounded, and ranks wait for each other."""

import json
from datetime import timedelta

import pytest

from conftest import miniature_recipe
from oprd.recipe import parse_recipe
from oprd.train.accelerator import longest_wait
from processes import TORCHRUN, run_two

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from oprd.objectives import base
from oprd.recipe import parse_recipe
from oprd.train.loop import train
from oprd.train.setup import setup

torch.set_num_threads(1)
real_init, real_weights, seen = Accelerator.__init__, base.off_policy_weights, []

def init(self, *args, **kwargs):  # accelerate offers FSDP2 on accelerators only
    real_init(self, *args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_mixed_precision("bf16")
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

def weights(*args, **kwargs):
    seen.append(real_weights(*args, **kwargs))
    return seen[-1]

Accelerator.__init__, base.off_policy_weights = init, weights
recipe = json.loads(Path(sys.argv[1]).read_text())
train(setup(parse_recipe(recipe)))
backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
found = {
    "first": [float(seen[0].min()), float(seen[0].max())], "then": float((seen[-1] - 1).abs().max()),
    "wait": backend.options._timeout.total_seconds(),
}
Path(sys.argv[1]).with_name(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, train_file):
    """What each of two ranks saw of one step with two updates on the same rollouts."""
    folder = tmp_path_factory.mktemp("ranks")
    rollout = {"group_size": 2, "max_completion_length": 48, "updates_per_rollout": 2}
    tree = miniature_recipe(
        folder / "run", train_file, objective={"type": "opd_sampled"}, rollout=rollout, bf16=True, max_steps=1
    )
    (folder / "recipe.json").write_text(json.dumps(tree))
    (folder / "worker.py").write_text(WORKER)
    code = run_two(TORCHRUN, folder / "worker.py", folder / "recipe.json", timeout=800)
    assert code == 0, (folder / "errors.txt").read_text()[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_weights_of_the_first_update_are_one(ranks):
    for rank in ranks:
        assert rank["first"] == [1.0, 1.0]
        assert rank["then"] > 1e-3


def test_ranks_wait_as_long_as_one_may_wait_for_servers(tmp_path, train_file):
    rollout = {"engine": {"type": "vllm", "urls": ["http://127.0.0.1:1"], "timeout_s": 50_000.0}}
    tree = miniature_recipe(tmp_path / "run", train_file)
    assert longest_wait(parse_recipe(tree | {"rollout": rollout})) - longest_wait(parse_recipe(tree)) == timedelta(
        seconds=100_000
    )


def test_ranks_wait_for_a_slow_one_for_hours(ranks):
    """A server may take its 30 minutes for a step, and a long completion on one rank as much; torch's own limit is 10."""
    assert min(rank["wait"] for rank in ranks) >= 2 * 3600
