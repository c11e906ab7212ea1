"""Golden runs: short training runs whose losses, sampled tokens and final weights are recorded once and compared later.

    python scripts/golden.py record OUT.json [NAMES...]     run the recipes of RUNS, add what they gave to OUT.json
    python scripts/golden.py compare FILE.json [NAMES...]   run them with the current program, print the first difference

Each run is a child process of `python -m oprd train recipe.yaml` on one thread and on the CPU, with the embedded miniature
models. `compare` takes the recipes from RUNS, not from the file; the file keeps the recipes as they were recorded. Losses,
gradient norms and the sums of weights must agree to a relative 1e-6, sampled tokens exactly; whether the weights are equal
bit for bit is told. Another CPU or another torch may round differently: record and compare on one machine.
"""

import hashlib
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "src" / "oprd" / "demo" / "models"
RELATIVE, ABSOLUTE = 1e-6, 1e-9

# Recipes. {models}, {data} and {tmp} are filled in at run time.


def local(name: str) -> dict[str, Any]:
    return {"type": "local", "model": f"{{models}}/{name}", "dtype": "float32"}


def student(**options: Any) -> dict[str, Any]:
    return {"model": "{models}/base"} | options


def rollout(**options: Any) -> dict[str, Any]:
    return {"group_size": 2, "max_completion_length": 48} | options


def recipe(*objectives: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Six steps of four prompts."""
    tree: dict[str, Any] = {
        "student": student(),
        "teacher": local("teacher"),
        "objective": list(objectives),
        "data": {"prompts": "{data}/train.jsonl"},
        "rollout": rollout(),
        "output_dir": "{tmp}/run",
        "prompts_per_step": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "health_tokens": 16,
        "save_steps": 100,
    }
    return tree | changes


OPRD = {"type": "oprd", "tokens": "all"}
OPD = {"type": "opd"}
SAMPLED = {"type": "opd_sampled"}
TOP_K = {"type": "opd_top_k", "k": 8}
NLL = {"type": "nll"}
BRIDGE = {"type": "oprd_bridge", "bridge": "{tmp}/bridge.safetensors", "tokens": "all"}
PUBLISHED = BRIDGE | {"type": "oprd_bridge_published", "layers": "last", "rank": 8}
OMNI = {"type": "omni_opd", "chunk_tokens": 8, "chunks": 3, "continuations": 4, "baseline": "batch_mean"}
EFFOPD = {"validation_prompts": 8}
SEQUENCE = {"source": {"type": "teacher"}}
REWRITE = {"source": {"type": "rewrite", "prompt": "{prompt}\n{completion}"}}
SELF = {"type": "self", "system_prompt": "Be right."}
SEVERAL = {"type": "several", "teachers": {"good": local("teacher"), "bad": local("base")}}
GIVEN = {"prompts": "{data}/given.jsonl"}
LORA = student(lora={"r": 4, "alpha": 8})

RUNS: dict[str, dict[str, Any]] = {
    # objectives
    "oprd": recipe(OPRD),
    "oprd_last_k_even_l2_sequence_mean": recipe(
        {"type": "oprd", "tokens": {"last": 8}, "layers": "even", "normalization": "l2", "weight": 100.0}
        | {"reduction": "sequence_mean"}
    ),
    "oprd_first_k_two_layers": recipe({"type": "oprd", "tokens": {"first": 5}, "layers": [2, 3]}),
    "opd_reverse_kl": recipe(OPD),
    "opd_forward_kl": recipe(OPD | {"divergence": "forward_kl"}),
    "opd_jsd": recipe(OPD | {"divergence": {"type": "jsd", "weight": 0.3}}),
    "opd_temperature_sequence_mean": recipe(OPD | {"kl_temperature": 2.0, "reduction": "sequence_mean"}),
    "opd_top_k_student": recipe(TOP_K | {"support": "student"}),
    "opd_top_k_teacher": recipe(TOP_K | {"support": "teacher", "divergence": "forward_kl"}),
    "opd_top_k_overlap": recipe(TOP_K | {"support": "overlap", "divergence": "jsd"}),
    "opd_sampled": recipe(SAMPLED),
    "opd_sampled_last_k": recipe(SAMPLED | {"tokens": {"last": 12}, "divergence": "forward_kl"}),
    "opd_sampled_redraw": recipe(SAMPLED | {"redraw": True}, rollout=rollout(**SEQUENCE)),
    "mixture_opd_oprd": recipe(SAMPLED, OPRD | {"weight": 10.0}),
    # students
    "lora": recipe(OPD, student=LORA),
    "lora_dropout": recipe(
        OPRD, student=student(lora={"r": 4, "dropout": 0.2, "target_modules": ["q_proj", "v_proj"]})
    ),
    "bf16": recipe(OPD, bf16=True),
    "gradient_checkpointing_micro_batches": recipe(
        OPRD, student=student(gradient_checkpointing=True), micro_batch_tokens=128
    ),
    "opd_micro_batches_linear_schedule": recipe(
        SAMPLED, micro_batch_tokens=128, lr_scheduler_type="linear", warmup_ratio=0.3, weight_decay=0.1, seed=7
    ),
    # teachers
    "self_teacher": recipe(OPD, teacher=SELF),
    "self_teacher_lora": recipe(OPD, teacher=SELF, student=LORA),
    "teacher_prompt_template": recipe(OPRD, teacher=local("teacher") | {"prompt_template": "{problem}+0"}),
    "several_teachers": recipe(OPRD, teacher=SEVERAL, data={"prompts": "{data}/teachers.jsonl"}),
    "sequence_nll": recipe(NLL, rollout=rollout(**SEQUENCE)),
    "rewrite_opd": recipe(OPD, rollout=rollout(**REWRITE)),
    "rewrite_mixture_opd_nll": recipe(OPD, NLL, rollout=rollout(**REWRITE)),
    "wide_teacher_opd": recipe(SAMPLED, teacher=local("wide_teacher")),
    "omni_opd": recipe(OMNI),
    "omni_opd_no_baseline_no_anchor": recipe(OMNI | {"baseline": "none", "anchor": 0.0}),
    # bridges; `oprd fit-bridge` runs first
    "bridge_student": recipe(BRIDGE),
    "bridge_reverse_kl": recipe(BRIDGE | {"loss": "reverse_kl", "weight": 1.0}),
    "bridge_projections": recipe(PUBLISHED),
    "bridge_wide_teacher": recipe(BRIDGE | {"layers": "all", "rank": 8}, teacher=local("wide_teacher")),
    # data and rollouts
    "data_prompts": recipe(
        OPD,
        data={"prompts": "{data}/train.jsonl", "limit": 10, "system_prompt": "Add.", "prompt_template": "{problem}="},
        rollout=rollout(sampling_temperature=0.8, top_p=0.9, engine={"type": "hf", "cache_tokens": 240}),
    ),
    "lambda_on_policy": recipe(OPD, data=GIVEN, rollout=rollout(source={"type": "student", "lambda_on_policy": 0.5})),
    "length_schedule": recipe(OPRD, rollout=rollout(length_schedule={"from": 8, "steps": 5}), max_steps=7),
    "updates_per_rollout": recipe(SAMPLED, rollout=rollout(updates_per_rollout=3)),
    "updates_per_rollout_omni": recipe(OMNI, rollout=rollout(updates_per_rollout=2)),
    # the loop
    "effopd_objective": recipe(OPRD, extrapolation=EFFOPD | {"score": "objective"}, max_steps=8, learning_rate=1e-4),
    "effopd_accuracy": recipe(
        SAMPLED, extrapolation=EFFOPD | {"score": "accuracy", "validation_samples": 2}, max_steps=8, learning_rate=1e-4
    ),
    "interrupted": recipe(OPRD),
    "interrupted_effopd": recipe(OPD, extrapolation=EFFOPD | {"score": "objective", "every": 2}, learning_rate=1e-4),
    "ddp": recipe(SAMPLED, micro_batch_tokens=128),
    "ddp_omni_opd": recipe(OMNI),
    "fsdp2": recipe(OPRD, micro_batch_tokens=128),
    "fsdp2_effopd": recipe(OPD, extrapolation=EFFOPD | {"score": "objective"}, learning_rate=1e-4),
}
FIT_FIRST = {name for name in RUNS if name.startswith("bridge_")}
STOPPED_IN_STEP = {"interrupted": 3, "interrupted_effopd": 3}
"""Ctrl-C while the step is under way; the run is then resumed."""
RENAMED = {
    "bridge_reverse_kl": {"train/reverse_kl/mean": "train/bridge_reverse_kl/mean"},
    "bridge_projections": {"train/oprd_bridge/mean": "train/oprd_bridge_published/mean"},
}
"""Losses whose metric has another name since they were recorded."""
TWO_PROCESSES = {"ddp": "ddp", "ddp_omni_opd": "ddp", "fsdp2": "fsdp2", "fsdp2_effopd": "fsdp2"}


def write_data(folder: Path) -> None:
    """The miniature's task, signed sums: alone, with worked answers, and with the name of a teacher."""
    rng, rows = random.Random(1), []
    while len(rows) < 64:
        terms = [rng.randint(1, 99) for _ in range(rng.randint(3, 5))]
        terms = [terms[0], *(term * rng.choice((1, -1)) for term in terms[1:])]
        problem = str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])
        if zlib.crc32(problem.encode()) % 8 == 0:  # of the held-out problems
            continue
        totals = [sum(terms[:n]) for n in range(1, len(terms) + 1)]
        lines = [f"{before}{term:+d}={before + term}" for before, term in zip(totals, terms[1:], strict=False)]
        completion = "\n".join([*lines, f"\\boxed{{{totals[-1]}}}"])
        rows.append(({"problem": problem, "answer": str(totals[-1])}, completion))
    write_lines(folder / "train.jsonl", [row for row, _ in rows])
    write_lines(folder / "given.jsonl", [row | {"completion": completion} for row, completion in rows])
    names = ("good", "bad", "good")
    write_lines(folder / "teachers.jsonl", [row | {"teacher": names[i % 3]} for i, (row, _) in enumerate(rows)])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def inputs(data: Path) -> dict[str, str]:
    """Hashes of the models and data that every run reads."""
    files = {f"{file.parent.name}/{file.name}": file for file in sorted(MODELS.glob("*/*.safetensors"))}
    files |= {f"{file.parent.name}/{file.name}": file for file in sorted(MODELS.glob("*/tokenizer.json"))}
    files |= {f"data/{file.name}": file for file in sorted(data.iterdir())}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


# In the child process


def child(log: str, how: str, stop_in_step: str, *arguments: str) -> None:
    """`python -m oprd ARGUMENTS` that writes down what every call of the rollout engine returned, one file per rank."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
    if how == "fsdp2":
        shard_on_cpu()
    seed_adapters()
    from oprd.rollout.hf import HFEngine

    rank, calls, real = os.environ.get("RANK", "0"), 0, HFEngine.generate

    def generate(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(stop_in_step):
            os.kill(os.getpid(), signal.SIGINT)
        written = real(self, *args, **options)
        ids = [[int(token) for token in row] for row in written.completion_ids]
        row = {"sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(), "completions": len(ids)}
        with Path(log, f"rank-{rank}.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        return written

    HFEngine.generate = generate  # type: ignore[method-assign]
    sys.argv = ["oprd", *arguments]
    runpy.run_module("oprd", run_name="__main__")


def seed_adapters() -> None:
    """Draw every LoRA adapter with a seed of its own: the program that was recorded left their first weights to chance."""
    import torch
    from peft.tuners.lora import LoraLayer

    adapters, real = 0, LoraLayer.reset_lora_parameters

    def reset(self: Any, *args: Any, **options: Any) -> None:
        nonlocal adapters
        adapters += 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(adapters)
            real(self, *args, **options)

    LoraLayer.reset_lora_parameters = reset  # type: ignore[method-assign]


def shard_on_cpu() -> None:
    """accelerate offers FSDP2 on accelerators only; this puts its state where it would be there, on CPU processes."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    real = Accelerator.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    Accelerator.__init__ = init  # type: ignore[method-assign]


# In the parent process


def run_one(name: str, data: Path) -> dict[str, Any]:
    """Run a recipe of RUNS in a folder of its own. Raises RuntimeError with the child's last words if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        file = tmp / "recipe.yaml"  # JSON is YAML
        file.write_text(json.dumps(filled(RUNS[name], {"models": MODELS, "data": data, "tmp": tmp})), encoding="utf-8")
        how, stop = TWO_PROCESSES.get(name, "alone"), STOPPED_IN_STEP.get(name, 0)
        if name in FIT_FIRST:
            launch(tmp / "fit", "alone", 0, "fit-bridge", str(file))
        launch(tmp / "train", how, stop, "train", str(file))
        if stop:
            launch(tmp / "train", how, 0, "train", str(file), "resume_from_checkpoint=latest")
        result = {
            "recipe": RUNS[name],
            "steps": [numbers(row) for row in read_lines(tmp / "run" / "metrics.jsonl")],
            "searches": [
                {key: row[key] for key in ("step", "score", "accepted")}
                for row in read_lines(tmp / "run" / "searches.jsonl")
            ],
            "rollouts": {
                f"{phase} {log.stem}": [[row["sha256"], row["completions"]] for row in read_lines(log)]
                for phase in ("fit", "train")
                for log in sorted((tmp / phase).glob("*.jsonl"))
            },
            "student": weights(tmp / "run" / "student"),
        }
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def filled(tree: Any, places: dict[str, Path]) -> Any:
    if isinstance(tree, dict):
        return {key: filled(value, places) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [filled(value, places) for value in tree]
    if isinstance(tree, str):
        for place, path in places.items():
            tree = tree.replace(f"{{{place}}}", str(path))
    return tree


def launch(log: Path, how: str, stop_in_step: int, *arguments: str) -> None:
    log.mkdir(exist_ok=True)
    launcher = [sys.executable]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if how != "alone":
        options = [
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
        ]
        launcher += ["-m", "accelerate.commands.launch", *options, "--main_process_port=0"]
        env["ACCELERATE_USE_CPU"] = "true"
    command = [*launcher, str(Path(__file__).resolve()), "child", str(log), how, str(stop_in_step), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
    expected = 130 if stop_in_step else 0
    if done.returncode != expected:
        raise RuntimeError(f"exit code {done.returncode} of {arguments[0]}: {(done.stderr or done.stdout)[-2000:]}")


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step that are compared. The gradient norm may be called train/grad_norm or train/grad_norm/..."""
    norm = next(key for key in row if key.startswith("train/grad_norm"))
    losses = [key for key in row if key.startswith("train/") and key.endswith("/mean") and key != norm]
    return (
        {"step": row["step"]}
        | {key: row[key] for key in losses}
        | {"train/grad_norm": row[norm]}
        | {key: row[key] for key in ("tokens/generated/sum", "tokens/supervised/sum")}
    )


def weights(folder: Path) -> dict[str, Any]:
    """Of the saved student: one hash over names and bytes, and [sum, L2 norm] of each tensor in float64."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    digest, told = hashlib.sha256(), {}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        told[name] = [float(value.double().sum()), float(value.double().norm())]
    return {"sha256": digest.hexdigest(), "tensors": told}


def renamed(name: str, then: dict[str, Any]) -> dict[str, Any]:
    names = RENAMED.get(name, {})
    return then | {"steps": [{names.get(key, key): x for key, x in row.items()} for row in then["steps"]]}


def first_difference(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    if len(now["steps"]) != len(then["steps"]):
        return f"{len(then['steps'])} steps then, {len(now['steps'])} now"
    # what was sampled first: where tokens differ, losses do
    if not now["rollouts"].keys() <= then["rollouts"].keys():
        return f"rollouts of {', '.join(then['rollouts'])} then, of {', '.join(now['rollouts'])} now"
    differences = []
    for row, (old, new) in enumerate(zip(then["steps"], now["steps"], strict=True), start=1):
        for key, value in old.items():
            if key not in new or not close(value, new[key]):
                differences.append(f"step {row}: {key} {value!r} then, {new.get(key)!r} now")
    for log, new in now["rollouts"].items():
        # at 7ba54df local teachers wrote through the engine too, and the student before a teacher that wrote everything
        old = iter(then["rollouts"][log])
        missing = next((i for i, row in enumerate(new, start=1) if row not in old), None)
        if missing is not None:
            differences.append(
                f"{log}: rollout {missing} differs ({len(then['rollouts'][log])} calls then, {len(new)} now)"
            )
    if not differences and now["searches"] != then["searches"]:
        for old, new in zip(then["searches"], now["searches"], strict=False):
            if old["accepted"] != new["accepted"] or not close(old["score"], new["score"]):
                differences.append(f"search: {old} then, {new} now")
        if len(then["searches"]) != len(now["searches"]):
            differences.append(f"{len(then['searches'])} searches then, {len(now['searches'])} now")
    old, new = then["student"], now["student"]
    if old["tensors"].keys() != new["tensors"].keys():
        differences.append(f"student: other tensors: {sorted(old['tensors'].keys() ^ new['tensors'].keys())[:4]}")
    for name in old["tensors"].keys() & new["tensors"].keys():
        for what, a, b in zip(("sum", "norm"), old["tensors"][name], new["tensors"][name], strict=True):
            if not close(a, b):
                differences.append(f"student: {what} of {name} {a!r} then, {b!r} now")
    return differences[0] if differences else None


def close(then: float, now: float) -> bool:
    return then == now or (then != then and now != now) or math.isclose(then, now, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def record(out: Path, names: list[str], data: Path) -> int:
    import oprd
    from oprd.train.run_folder import describe_machine

    source = Path(str(oprd.__file__)).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"oprd in {source}, commit {commit}")
    stored = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"runs": {}}
    machine = describe_machine()
    machine.pop("git_commit", None)
    stored = {"commit": commit, "machine": machine, "inputs": inputs(data)} | stored
    failed = 0
    for name in names:
        try:
            # a run that was recorded again names its own commit
            stored["runs"][name] = run_one(name, data) | ({} if commit == stored["commit"] else {"commit": commit})
        except RuntimeError as error:
            failed += 1
            print(f"{name}: FAILED {error}", flush=True)
            continue
        print(f"{name}: {stored['runs'][name]['seconds']} s", flush=True)
        runs = ",\n".join(f"{json.dumps(key)}: {json.dumps(stored['runs'][key])}" for key in sorted(stored["runs"]))
        head = json.dumps({key: value for key, value in stored.items() if key != "runs"}, indent=1)
        out.write_text(f'{head[:-2]},\n "runs": {{\n{runs}\n}}}}\n', encoding="utf-8")
    return int(failed > 0)


def compare(file: Path, names: list[str], data: Path) -> int:
    import oprd

    print(f"oprd in {Path(str(oprd.__file__)).parent}")
    stored = json.loads(file.read_text(encoding="utf-8"))
    here = inputs(data)
    different = [
        f"{name}: other contents than then" for name, value in stored["inputs"].items() if here.get(name) != value
    ]
    print("\n".join(different), end="\n" * bool(different))
    for name in names:
        if name not in stored["runs"]:
            difference, now = "not recorded", None
        else:
            try:
                now = run_one(name, data)
                difference = first_difference(renamed(name, stored["runs"][name]), now)
            except (RuntimeError, OSError, LookupError, StopIteration) as error:
                difference, now = f"FAILED {error!r}", None
        if difference is None and now is not None:
            same = now["student"]["sha256"] == stored["runs"][name]["student"]["sha256"]
            print(f"{name} OK, weights {'equal' if same else 'close, not equal'}, {now['seconds']} s", flush=True)
        else:
            different.append(name)
            print(f"{name} DIFFERENT: {difference}", flush=True)
    return int(bool(different))


def main() -> int:
    command, *arguments = sys.argv[1:] or [""]
    if command == "child":
        child(*arguments)
        return 0
    if command not in ("record", "compare") or not arguments:
        raise SystemExit(__doc__)
    names = arguments[1:] or list(RUNS)
    if unknown := set(names) - RUNS.keys():
        raise SystemExit(f"unknown runs: {', '.join(sorted(unknown))}; known: {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        return (record if command == "record" else compare)(Path(arguments[0]), names, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
