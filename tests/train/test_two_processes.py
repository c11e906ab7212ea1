"""Two processes against one: the same weights, the same decisions, and every part of a run under DDP and FSDP2.

All runs of a kind share one `accelerate launch`, because starting two processes takes longer than a miniature run.
"""

import json
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from conftest import MODELS, ROOT, miniature_recipe
from models.families_tiny import make_model
from oprd.objectives import AnyObjective
from oprd.recipe import parse_recipe
from oprd.train.fit_bridge import fit_bridge
from oprd.train.run import run_recipe
from processes import run_two
from train.runs import (
    MIXTURE,
    assert_same_weights,
    evaluations,
    metrics,
    read_lines,
    saved_student,
    searches,
    write_completions,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WORKER = """
# `oprd train` for each recipe in turn; then the process writes down what it holds of a run with extrapolation
import hashlib, json, os, shutil, sys
from pathlib import Path
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from oprd.cli import main
from oprd.student import Student
from oprd.train import run

torch.set_num_threads(1)
jobs = json.loads(Path(sys.argv[1]).read_text())
real_init, real_train, real_clip, in_buckets = Accelerator.__init__, run.train, Student.clip_gradients, []

def clip(self):
    gradients = [p.grad for p in self.wrapper.parameters() if p.grad is not None]
    if not job["wrap"]:
        in_buckets.append(len({g.untyped_storage().data_ptr() for g in gradients}) < len(gradients))
    return real_clip(self)

def init(self, *args, **kwargs):
    real_init(self, *args, **kwargs)
    if job["wrap"]:
        # accelerate offers FSDP2 on accelerators only; this puts its state where it would be there
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=job["wrap"])
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

def train(parts):
    result = real_train(parts)
    if parts.extrapolation is not None:
        model = parts.method.student.lm.model
        whole = [w.full_tensor() if hasattr(w, "full_tensor") else w for _, w in sorted(model.named_parameters())]
        held = [t.to_local() if hasattr(t, "to_local") else t for t in parts.extrapolation.state().values()]
        witness = {
            "weights": hashlib.sha256(b"".join(w.clone().detach().numpy().tobytes() for w in whole)).hexdigest(),
            "held": sum(t.numel() for t in held),
            "in_buckets": in_buckets,
            "moved": sum(t.numel() for t in parts.extrapolation.state().values()),
        }
        parts.folder.path.with_name(f"rank-{parts.ranks.rank}.json").write_text(json.dumps(witness))
    return result

Accelerator.__init__, run.train, Student.clip_gradients = init, train, clip
for job in jobs:
    done = Path(job["recipe"]).with_name("run") / "result.json"
    if job["again"] and os.environ["RANK"] == "0":  # as if it had died before the end
        shutil.copytree(done.parent, done.parent.with_name("first"))
        done.unlink()
    sys.argv = ["oprd", "train", job["recipe"], *job["again"]]
    try:
        main()
    except SystemExit as exit:
        if exit.code:
            raise
"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Runs of one launch, each in a folder of its name."""

    folder: Path
    errors: str

    def run(self, name: str) -> Path:
        """The folder of a finished run."""
        found = self.folder / name / "run"
        assert (found / "result.json").is_file(), self.errors
        return found


def launch(folder: Path, how: str, trees: dict[str, dict[str, Any]]) -> Launch:
    """`accelerate launch` on two processes; ends them all whatever happens."""
    jobs = []
    for name, tree in trees.items():
        file = folder / name / "recipe.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(tree | {"output_dir": str(folder / name / "run")}))
        wrap = {"ddp": None, "fsdp2": "no_wrap" if name == "in one piece" else "transformer_based_wrap"}[how]
        jobs.append({"recipe": str(file), "wrap": wrap, "again": []})
        if name == "resumed":
            checkpoint = folder / name / "run" / "checkpoints" / "step-000001"
            jobs.append(jobs[-1] | {"again": [f"resume_from_checkpoint={checkpoint}"]})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER)
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = ["accelerate.commands.launch", *options, "--main_process_port=0"]
    run_two(launcher, folder / "worker.py", folder / "jobs.json", timeout=1200)
    return Launch(folder=folder, errors=(folder / "errors.txt").read_text()[-6000:])


def begun(run: Path, copy: Path, step: int) -> str:
    """Copy a finished run to go on with after this step, as if it had not ended; the checkpoint."""
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    return str(copy / "checkpoints" / f"step-{step:06d}")


HOW = ("ddp", "fsdp2")
OBJECTIVES = {
    "oprd": "mixture",
    "ride": "mixture",
    "opd": "mixture",
    "opd_top_k": "mixture",
    "opd_sampled": "moved",
    "oprd_bridge": "bridge reverse_kl",
    "oprd_bridge_published": "bridge published",
    "omni_opd": "omni",
    "nll": "sequence",
}
"""A run that has it, by objective."""
GIVEN = {"source": {"type": "dataset"}, "max_completion_length": 48}
EXACT = {"adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "max_steps": 2}
EFFOPD = {"validation_prompts": 4, "score": "objective", "factors": [2.0, 4.0]}
WIDE = {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"}
BRIDGE = {"type": "oprd_bridge", "tokens": "all", "layers": "all", "rank": 4}
FAMILIES = {
    "gemma3": {"type": "opd"},  # its vision tower gets no gradient
    "opt": {"type": "oprd", "layers": [1], "tokens": "all"},  # nor does its final norm, which stands before the blocks
    "deepseek_v32": {"type": "oprd", "tokens": "all"},  # nor do its indexers
}
"""Families with weights that get no gradient, for which DDP would wait, and an objective that shows it."""
BRIDGES = {
    "bridge hidden": BRIDGE,
    "bridge reverse_kl": BRIDGE | {"layers": "last", "loss": "reverse_kl", "weight": 1.0},
    "bridge published": BRIDGE | {"type": "oprd_bridge_published"},
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory, train_file, held_out_file) -> dict[str, dict[str, Any]]:
    """The recipes by name; their bridges are fitted."""
    folder = tmp_path_factory.mktemp("recipes")
    # a long worked answer in each step, as many tokens as the short ones of the other rank: two micro-batches and one
    unequal = folder / "unequal.jsonl"
    long = "1+2=3\n3+4=7\n7+5=12\n12-9=3\n\\boxed{3}"
    rows = [{"problem": f"{i}+2+3", "completion": long if i in {0, 13} else "7"} for i in range(16)]
    unequal.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(prompts: Path = train_file, **changes: Any) -> dict[str, Any]:
        return miniature_recipe(folder / "alone", prompts, **({"max_steps": 2} | changes))

    exact = EXACT | {"rollout": GIVEN, "prompts_per_step": 8, "micro_batch_tokens": 60}
    lora = {"model": str(MODELS / "base"), "lora": {"r": 4}}
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 2, "max_completion_length": 48}
    omni = {"type": "omni_opd", "chunk_tokens": 5, "chunks": 2, "continuations": 2}
    found = {
        "mixture": recipe(unequal, objective=[*MIXTURE, {"type": "opd"}, {"type": "ride"}], seed=3, **exact),
        "resumed": recipe(student=lora, teacher={"type": "self", "prompt_template": "{problem}="}, save_steps=1),
        "omni": recipe(objective=omni, evaluation=evaluation, **EXACT),
        "rewrite": recipe(
            objective={"type": "nll"},
            rollout={"source": {"type": "rewrite"}, "group_size": 2, "max_completion_length": 48},
        ),
        "sequence": recipe(
            objective={"type": "nll"}, rollout={"source": {"type": "teacher"}, "max_completion_length": 48}, **EXACT
        ),
        "moved": recipe(
            objective=[*MIXTURE, {"type": "opd_sampled"}],
            save_steps=1,
            save_total_limit=4,
            evaluation=evaluation,
            rollout={"group_size": 2, "max_completion_length": 48},
            **EXACT | {"max_steps": 4},
            health_tokens=0,
        ),
        "search": recipe(
            write_completions(folder / "given.jsonl", train_file),
            rollout=GIVEN,
            extrapolation=EFFOPD,
            learning_rate=1e-4,
        ),
    }
    found["recomputed"] = found["mixture"] | {
        "student": {"model": str(MODELS / "base"), "gradient_checkpointing": True}
    }
    for name, objective in FAMILIES.items():
        student, teacher = (save_family(name, seed, folder / f"{name} {seed}") for seed in (0, 1))
        config = {"type": "local", "model": teacher, "dtype": "float32"}
        found[name] = recipe(unequal, student={"model": student}, teacher=config, objective=objective, **exact)
    for name, objective in BRIDGES.items():
        file = str(folder / f"{name.removesuffix('reverse_kl').removesuffix('hidden')}.safetensors")
        found[name] = recipe(unequal, teacher=WIDE, objective=objective | {"bridge": file}, **exact)
        if not Path(file).exists():
            fit_bridge(parse_recipe(found[name]))
    return found


def save_family(name: str, seed: int, folder: Path) -> str:
    make_model(name, seed).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "base").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(trees, tmp_path_factory):
    """The run of a recipe on one process."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = run_recipe(parse_recipe(trees[name] | {"output_dir": str(folder / name)})).run_folder
        return done[name]

    return run


@pytest.fixture(scope="module")
def two(trees, alone, tmp_path_factory):
    """The run of a recipe on two processes."""
    both = ["mixture", "resumed", "omni", "sequence", "bridge reverse_kl", "bridge published", "search", "moved"]
    wanted = {
        "ddp": [*both, "rewrite", *FAMILIES],
        "fsdp2": [*both, "bridge hidden", "in one piece", "recomputed"],
    }
    done: dict[str, Launch] = {}

    def run(how: str, name: str) -> Path:
        if how not in done:
            of_kind = {key: (trees | {"in one piece": trees["search"]})[key] for key in wanted[how]}
            folder = tmp_path_factory.mktemp(how)
            # from one process to DDP, from DDP to FSDP2
            before, step = (alone("moved"), 1) if how == "ddp" else (run("ddp", "moved"), 2)
            of_kind["moved"] |= {"resume_from_checkpoint": begun(before, folder / "moved" / "run", step)}
            done[how] = launch(folder, how, of_kind)
        return done[how].run(name)

    return run


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("ddp", "mixture"),
        ("fsdp2", "mixture"),
        *((how, name) for how in HOW for name in ("omni", "sequence", "bridge reverse_kl", "bridge published")),
        ("fsdp2", "bridge hidden"),
        ("fsdp2", "recomputed"),
        *(("ddp", name) for name in FAMILIES),
    ],
)
def test_two_processes_give_the_weights_of_one(how, name, alone, two):
    theirs, ours = alone("mixture" if name == "recomputed" else name), two(how, name)
    assert_same_weights(saved_student(theirs), saved_student(ours))
    for a, b in zip(metrics(theirs), metrics(ours), strict=True):
        assert a["train/loss/mean"] == pytest.approx(b["train/loss/mean"], rel=1e-5)
        assert a["train/grad_norm/mean"] == pytest.approx(b["train/grad_norm/mean"], rel=1e-4)
        if name == "mixture":
            assert a["health/top_16_overlap/mean"] == pytest.approx(b["health/top_16_overlap/mean"], abs=0.2)


def test_every_objective_is_in_the_table_of_the_docs(alone, two):
    """`yes`: the saved weights of two processes are those of one."""
    objectives = [kind.model_fields["type"].default for kind in typing.get_args(typing.get_args(AnyObjective)[0])]
    assert sorted(OBJECTIVES) == sorted(objectives)
    rows = []
    for objective, name in OBJECTIVES.items():
        for how in HOW:
            assert_same_weights(saved_student(alone(name)), saved_student(two(how, name)))
        rows.append(f"| `{objective}` | yes | yes | yes | no |")
    assert "\n".join(rows) in (ROOT / "docs" / "processes.md").read_text()


@pytest.mark.parametrize("how", HOW)
def test_the_seconds_of_a_step_are_told_for_every_process(how, two):
    """The parts of each add up to the same step, and the process with less to do waits."""
    for row in read_lines(two(how, "mixture") / "metrics.jsonl"):
        parts = [
            {
                name: row[f"time/{name}_s/rank_{rank}"]
                for name in ("rollout", "transfer", "teacher", "update", "waiting", "other")
            }
            for rank in (0, 1)
        ]
        assert min(parts[0]["update"], parts[1]["update"], parts[0]["teacher"], parts[0]["waiting"]) > 0
        assert sum(parts[0].values()) == pytest.approx(sum(parts[1].values()), abs=0.5)
        assert parts[0]["update"] == row["time/update_s/sum"]


@pytest.mark.parametrize("how", HOW)
def test_a_sampled_run_resumes_exactly(how, two):
    """A LoRA student whose teacher is itself, gone on with after its first step."""
    run = two(how, "resumed")
    first = run.with_name("first")
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert metrics(run) == metrics(first)
    ours, theirs = (load_file(folder / "student" / "adapter_model.safetensors") for folder in (run, first))
    assert_same_weights(ours, theirs, atol=0.0)


@pytest.mark.parametrize("how", HOW)
def test_a_run_goes_on_with_more_processes_and_with_fewer(how, alone, trees, two, tmp_path, capfd):
    """Step 1 by one process, the next under DDP, from step 3 on under FSDP2; and step 4 by one again: the same completions, the
    same run."""
    whole, more, fewer = alone("moved"), two(how, "moved"), tmp_path / "run"
    checkpoint = begun(more, fewer, step=3)
    run_recipe(parse_recipe(trees["moved"] | {"output_dir": str(fewer), "resume_from_checkpoint": checkpoint}))
    for run in (more, fewer):
        for a, b in zip(metrics(whole), metrics(run), strict=True):
            assert a["train/loss/mean"] == pytest.approx(b["train/loss/mean"], rel=1e-5)
        assert_same_weights(saved_student(whole), saved_student(run))
        assert evaluations(whole) == evaluations(run)
    assert "The checkpoint is of 2 processes, this run has 1" in capfd.readouterr().err


@pytest.mark.parametrize("how", HOW)
def test_continuations_and_evaluations_of_both_processes_add_up(how, two):
    rows = metrics(two(how, "omni"))
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["omni/audited/share"] <= 1
        assert row["omni/teacher_tokens/mean"] > 0
        assert row["train/grad_norm/mean"] > 0
    (evaluation,) = evaluations(two(how, "omni"))
    assert evaluation["problems"] == 12


def test_rewrites_for_both_processes_add_up(two):
    for row in metrics(two("ddp", "rewrite")):
        reasons = ("no_reply", "empty", "unfinished", "longer", "no_answer", "other_answer", "wrong_answer")
        rejected = sum(row[f"rewrite/{reason}/sum"] for reason in reasons)
        assert rejected + row["rewrite/kept/share"] * 8 == pytest.approx(8)


@pytest.mark.parametrize(("how", "name"), [("ddp", "search"), ("fsdp2", "search"), ("fsdp2", "in one piece")])
def test_two_processes_accept_the_same_candidates(how, name, alone, two):
    """In one piece: nothing but the root is wrapped, and weights stay gathered after a forward pass."""
    run = two(how, name)
    one, other = (read_lines(run.with_name(f"rank-{rank}.json"))[0] for rank in (0, 1))
    assert one["weights"] == other["weights"]
    found = searches(run)
    assert any(row["accepted"] for row in found)
    if how == "ddp":
        assert one["held"] == one["moved"]
        assert all(one["in_buckets"] + other["in_buckets"]), "a gradient beside what DDP reduces"
        assert one["in_buckets"]
        return
    # only shards are held; and every process scores all prompts, as one process alone does
    assert one["held"] + other["held"] == one["moved"]
    theirs = alone("search")
    for ours, of_one in zip(found, searches(theirs), strict=True):
        assert ours["accepted"] == of_one["accepted"]
        assert ours["score"] == pytest.approx(of_one["score"], rel=1e-3)
    # a multiple of delta is a multiple of its rounding
    assert_same_weights(saved_student(theirs), saved_student(run), atol=1e-5)
