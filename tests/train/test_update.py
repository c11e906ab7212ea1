"""One update: however the step is split, on one process or two, the weights are the same."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import MODELS, miniature_recipe
from oprd.config.reading import parse_recipe
from oprd.data.collate import split_by_tokens
from oprd.errors import TrainingStopped
from oprd.train.build import build
from oprd.train.fit_bridge import fit_bridge
from oprd.train.log import Clock
from oprd.train.loop import train
from oprd.train.update import Update, mean_of, update_step
from oprd.types import Rollouts

OBJECTIVES = {
    "oprd": {"type": "oprd", "tokens": "all"},
    "oprd-l2-sequence": {"type": "oprd", "normalization": "l2", "reduction": "sequence_mean", "coefficient": 100.0},
    "oprd-last-8": {"type": "oprd", "tokens": "last_k", "k": 8, "layers": "even"},
    "opd": {"type": "opd"},
    "opd-sequence": {"type": "opd", "divergence": "jsd", "reduction": "sequence_mean"},
    "opd-sampled": {"type": "opd", "estimator": "sampled"},
    "mixture": {
        "type": "mixture",
        "terms": [
            {"type": "opd", "estimator": "top_k", "support": "overlap", "tokens": "first_k", "k": 5},
            {"type": "oprd", "coefficient": 10.0, "reduction": "sequence_mean"},
        ],
    },
}


def rollouts_of(run) -> Rollouts:
    """Completions of very unequal length, one of them empty, one cut."""
    prompts = run.prompts[:5]
    texts = ["12+34=46\n46-5=41\n\\boxed{41}", "", "7", "1+2=3\n3+4=7\n7+5=12\n12-9=3\n\\boxed{3}", "9-9=0"]
    ids = [tuple(run.lm.tokenizer(text)["input_ids"]) for text in texts]
    return Rollouts(prompts=prompts, completion_ids=tuple(ids), finished=(False,) * 5)


def weights_after_a_step(tmp_path, train_file, objective, **changes) -> dict[str, torch.Tensor]:
    # plain SGD-sized comparisons would hide behind Adam's sign-like first step, so weights after two steps are compared
    tree = miniature_recipe(tmp_path, train_file, objective=objective, health_tokens=0, **changes)
    run = build(parse_recipe(tree))
    for _ in range(2):
        update_step(run, rollouts_of(run), Clock(torch.device("cpu")))
    return {name: value.detach().clone() for name, value in run.lm.model.state_dict().items()}


def assert_same_weights(ours, theirs) -> None:
    for name, value in ours.items():
        assert_close(value, theirs[name], atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_micro_batching_gives_the_same_weights(name, tmp_path, train_file):
    objective = OBJECTIVES[name]
    # eps above the noise of float32 sums: Adam divides by the gradient's size, and near zero it would amplify rounding
    options = {"adam_epsilon": 1e-4}
    whole = weights_after_a_step(tmp_path / "a", train_file, objective, **options)
    alone = weights_after_a_step(tmp_path / "b", train_file, objective, micro_batch_tokens=1, **options)
    pairs = weights_after_a_step(tmp_path / "c", train_file, objective, micro_batch_tokens=100, **options)
    assert_same_weights(whole, alone)
    assert_same_weights(whole, pairs)
    start = build(parse_recipe(miniature_recipe(tmp_path / "d", train_file))).lm.model.state_dict()
    assert any(float((whole[name] - start[name]).abs().max()) > 1e-4 for name in whole), "nothing was trained"


def test_the_order_of_the_completions_does_not_matter(tmp_path, train_file):
    weights = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        tree = miniature_recipe(tmp_path / str(order[0]), train_file, adam_epsilon=1e-4)
        run = build(parse_recipe(tree))
        update_step(run, rollouts_of(run).take(order), Clock(torch.device("cpu")))
        weights.append(dict(run.lm.model.state_dict()))
    assert_same_weights(*weights)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path, train_file):
    student = miniature_recipe(tmp_path, train_file)["student"]
    plain = weights_after_a_step(tmp_path / "a", train_file, OBJECTIVES["mixture"])
    checkpointed = weights_after_a_step(
        tmp_path / "b", train_file, OBJECTIVES["mixture"], student=student | {"gradient_checkpointing": True}
    )
    assert_same_weights(plain, checkpointed)


def test_micro_batches_keep_to_the_budget_and_to_one_teacher(tmp_path, train_file):
    run = build(parse_recipe(miniature_recipe(tmp_path, train_file)))
    rollouts = rollouts_of(run)
    for budget in (1, 60, 100, 10_000):
        micros = split_by_tokens(rollouts, budget)
        assert sorted(ids for m in micros for ids in m.completion_ids) == sorted(rollouts.completion_ids)
        for micro in micros:
            sizes = [len(p.token_ids) + len(c) for p, c in zip(micro.prompts, micro.completion_ids, strict=True)]
            assert len(micro) == 1 or len(micro) * max(sizes) <= budget


def test_a_step_without_a_supervised_token_stops_with_the_reason(tmp_path, train_file):
    run = build(parse_recipe(miniature_recipe(tmp_path, train_file)))
    empty = Rollouts(prompts=run.prompts[:2], completion_ids=((), ()), finished=(True, True))
    with pytest.raises(TrainingStopped, match="every completion is empty"):
        update_step(run, empty, Clock(torch.device("cpu")))


def test_non_finite_steps_are_skipped_and_counted_and_stop_the_run(tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, max_skipped_steps=2, health_tokens=0)
    run = build(parse_recipe(tree))
    teacher = run.teacher.lm.model
    with torch.no_grad():
        teacher.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    before = {name: value.clone() for name, value in run.lm.model.state_dict().items()}
    with pytest.raises(TrainingStopped, match="2 steps in a row had a non-finite loss or gradient"):
        train(run)
    for name, value in run.lm.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped_steps/total"] for row in rows] == [1, 2]


def test_a_step_of_several_updates_that_cannot_be_made_is_one_skipped_step(tmp_path, train_file):
    rollout = {"group_size": 2, "max_completion_length": 48, "updates_per_rollout": 3}
    tree = miniature_recipe(tmp_path / "run", train_file, max_skipped_steps=2, health_tokens=0, rollout=rollout)
    run = build(parse_recipe(tree))
    with torch.no_grad():
        run.teacher.lm.model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(TrainingStopped, match=r"2 steps in a row .* the last is step 2"):
        train(run)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped_steps/total"] for row in rows] == [1, 2]


def test_a_skipped_update_among_others_is_counted_and_leaves_the_step_standing():
    fine = Update(losses=(1.0,), supervised=(8,), grad_norm=2.0, finite=True)
    lost = Update(losses=(math.nan,), supervised=(8,), grad_norm=math.nan, finite=False)
    assert mean_of((fine, lost, replace(fine, losses=(3.0,)))) == replace(fine, losses=(2.0,))
    assert not mean_of((lost, lost)).finite


# Two processes against one, over the command line


SHARDED = """
# accelerate offers FSDP2 on accelerators only; this puts its state where it would be there, on two CPU processes
import sys
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
real = Accelerator.__init__
def init(self, *args, **kwargs):
    real(self, *args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
Accelerator.__init__ = init
from oprd.cli import main
main()
"""


def launch(recipe: Path, how: str) -> None:
    """The command line on two processes, by `accelerate launch`."""
    target = ["-m", "oprd"]
    if how == "fsdp2":
        script = recipe.with_name("sharded.py")
        script.write_text(SHARDED)
        target = [str(script)]
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port=0", *target]
    done = subprocess.run(
        [*command, "train", str(recipe)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def given_completions(tmp_path_factory) -> Path:
    """Worked answers of very unequal length: rank 0 gets the long ones, and several micro-batches of them."""
    path = tmp_path_factory.mktemp("given") / "given.jsonl"
    long = "1+2=3\n3+4=7\n7+5=12\n12-9=3\n\\boxed{3}"
    rows = [{"problem": f"{i}+2+3", "completion": long if i % 2 == 0 else "7"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, given_completions):
    """The run on one process, with the file's completions instead of sampled ones."""

    def tree(folder: Path) -> dict[str, object]:
        return miniature_recipe(
            folder,
            given_completions,
            objective=OBJECTIVES["mixture"],
            rollout={"lambda_on_policy": 0.0, "max_completion_length": 48},
            prompts_per_step=8,
            micro_batch_tokens=60,
            max_steps=2,
            seed=3,
            adam_epsilon=1e-4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
        )

    out = tmp_path_factory.mktemp("alone") / "run"
    run = build(parse_recipe(tree(out)))
    train(run)
    return tree, out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_give_the_weights_of_one(how, alone, tmp_path):
    tree, expected = alone
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree(tmp_path / "run")))
    launch(tmp_path / "recipe.yaml", how)
    ours = load_file(tmp_path / "run" / "student" / "model.safetensors")
    theirs = load_file(expected / "student" / "model.safetensors")
    assert_same_weights(theirs, ours)
    one, two = (
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (expected, tmp_path / "run")
    )
    for a, b in zip(one, two, strict=True):
        assert a["train/loss/mean"] == pytest.approx(b["train/loss/mean"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
        assert a["health/top_16_overlap/mean"] == pytest.approx(b["health/top_16_overlap/mean"], abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_sample_evaluate_and_resume(how, tmp_path, train_file, held_out_file):
    evaluation = {"benchmarks": [str(held_out_file)], "samples": 2, "max_completion_length": 48}
    tree = miniature_recipe(tmp_path / "run", train_file, max_steps=2, evaluation=evaluation)
    tree |= {"student": tree["student"] | {"lora": {"r": 4}}, "resume_from_checkpoint": "latest"}
    tree |= {"teacher": {"type": "self", "prompt_template": "{problem}="}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    launch(tmp_path / "recipe.yaml", how)
    (tmp_path / "run" / "result.json").unlink()  # as if it had died before the end
    launch(tmp_path / "recipe.yaml", how)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["evaluations"][0]["problems"] == 12
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert (tmp_path / "run" / "student" / "adapter_model.safetensors").is_file()


TALKING = {
    "omni": {"objective": {"type": "omni_opd", "chunk_tokens": 5, "chunks": 2, "continuations": 2}},
    "rewrite": {
        "objective": {"type": "nll"},
        "teacher": {
            "type": "rewrite",
            "teacher": {"type": "local", "model": str(MODELS / "teacher"), "dtype": "float32"},
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "which"), [("ddp", "omni"), ("fsdp2", "omni"), ("ddp", "rewrite")])
def test_two_processes_are_told_by_their_teachers_and_add_up(how, which, tmp_path, train_file):
    tree = miniature_recipe(tmp_path / "run", train_file, max_steps=2, **TALKING[which])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    launch(tmp_path / "recipe.yaml", how)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        if which == "omni":
            assert 0 < row["omni/audited/share"] <= 1
            assert row["omni/teacher_tokens/mean"] > 0
            assert row["train/grad_norm"] > 0
        else:
            reasons = ("no_reply", "empty", "unfinished", "longer", "no_answer", "other_answer", "wrong_answer")
            rejected = sum(row[f"rewrite/{reason}/sum"] for reason in reasons)
            assert rejected + row["rewrite/kept/share"] * 8 == pytest.approx(8)  # of both processes
    if which == "omni":
        assert rows[0]["omni/anchor_kl/mean"] < 1e-6 < rows[1]["omni/anchor_kl/mean"]
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "space", "loss"),
    [
        ("ddp", "projections", "hidden"),
        ("fsdp2", "projections", "hidden"),
        ("fsdp2", "student", "hidden"),
        ("fsdp2", "student", "reverse_kl"),
    ],
)
def test_a_bridge_gives_the_weights_of_one_process(how, space, loss, given_completions, tmp_path):
    """Projections that train are part of what is wrapped; under DDP a second stage, through the student's head, wraps anew."""

    def tree(name: str) -> dict[str, object]:
        objective = {"type": "oprd_bridge", "bridge": str(tmp_path / "b.safetensors"), "tokens": "all", "rank": 4}
        objective |= {"layers": "all", "space": space, "trainable": space == "projections", "fit": {"held_out": 0.25}}
        through_head = {"layers": "last", "space": "student", "trainable": False, "loss": "reverse_kl"}
        if loss == "reverse_kl":
            objective |= through_head
        options = {"rollout": {"lambda_on_policy": 0.0, "max_completion_length": 48}, "adam_epsilon": 1e-4}
        wide = {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"}
        made = miniature_recipe(tmp_path / name, given_completions, teacher=wide, objective=objective, **options)
        made |= {"prompts_per_step": 8, "micro_batch_tokens": 60, "max_steps": 2, "lr_scheduler_type": "constant"}
        if how == "ddp":
            made["stages"] = [{"objective": o, "max_steps": 1} for o in (objective, objective | through_head)]
            del made["objective"], made["max_steps"]
        return made

    fit_bridge(parse_recipe(tree("fit")))
    train(build(parse_recipe(tree("one"))))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree("two")))
    launch(tmp_path / "recipe.yaml", how)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("two", "one"))
    assert_same_weights(theirs, ours)
    if how == "fsdp2" and space == "projections":
        one, two = (load_file(tmp_path / name / "bridge.safetensors") for name in ("one", "two"))
        assert_same_weights(one, two)
        start = load_file(tmp_path / "b.safetensors")["block_01.student_projection"][:4]
        assert float((one["block_01.student_projection"] - start).abs().max()) > 1e-4
