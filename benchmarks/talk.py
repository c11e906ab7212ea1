"""Teachers that only talk, on the miniature: OmniOPD, its parts, other uses of the same teacher, and MPD.

    make serve-miniature &
    python benchmarks/talk.py omni omni-random sampled sequence --base-url http://127.0.0.1:8411/v1 --seeds 0 1 2
    python scripts/make_verbose_models.py student teacher
    python benchmarks/talk.py opd-verbose mpd mpd-nll --seeds 0 1 2
    python benchmarks/talk.py --table

Each run's line is added to benchmarks/results/talk.json; a variant and seed that is there already, with the teacher in the
same place, is not run again.
MPD's pair of models is that of scripts/make_verbose_models.py; for its text-only variants on a server, start that with
`make serve-miniature MODEL=runs/verbose/teacher`.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from oprd.demo.run import HELD_OUT_PROBLEMS, MODELS, TRAINING_PROBLEMS, evaluation_options
from oprd.demo.task import sums, write_jsonl
from oprd.files import read_jsonl
from oprd.objectives import omni_opd
from oprd.recipe import parse_recipe
from oprd.train.run import run_recipe
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "talk.json"
VERBOSE = ROOT / "runs" / "verbose"
REWRITE_PROMPT = "{prompt}\n{completion}"
"""What the teacher of make_verbose_models.py was taught to answer."""
OPD, NLL = {"type": "opd"}, {"type": "nll"}
OMNI = {"type": "omni_opd", "chunk_tokens": 8, "chunks": 3, "continuations": 6, "baseline": "batch_mean"}
RANDOM = ("omni-random", "omni-one-random-chunk")
"""Variants whose chunks start anywhere, the ablation of the paper: see `random_chunks`."""
VARIANTS: dict[str, dict[str, Any]] = {
    "omni": {"objective": OMNI, "learning_rate": 3e-4},
    "omni-published": {"objective": OMNI | {"baseline": "none"}, "learning_rate": 3e-4},
    "omni-leave-one-out": {"objective": OMNI | {"baseline": "leave_one_out"}, "learning_rate": 3e-4},
    "omni-no-anchor": {"objective": OMNI | {"anchor": 0.0}, "learning_rate": 3e-4},
    "omni-random": {"objective": OMNI, "learning_rate": 3e-4},
    "omni-no-prior": {"objective": OMNI | {"prior": 0.0}, "learning_rate": 3e-4},
    # three chunks are 60% of a completion, wherever they lie; with one the choice can show
    "omni-one-chunk": {"objective": OMNI | {"chunks": 1}, "learning_rate": 3e-4},
    "omni-one-random-chunk": {"objective": OMNI | {"chunks": 1}, "learning_rate": 3e-4},
    "sampled": {"objective": {"type": "opd_sampled"}, "learning_rate": 4e-4},
    # a completion has about 36 tokens, its audit 3 x 6 x 8: four times the prompts for as many teacher tokens
    "sequence": {"objective": NLL, "learning_rate": 3e-4, "prompts_per_step": 96, "source": {"type": "teacher"}},
}
REWRITES = {"type": "rewrite", "prompt": REWRITE_PROMPT}
VERBOSE_VARIANTS: dict[str, dict[str, Any]] = {
    # reverse KL on the student's completions, on the teacher's rewrites, with their likelihood, and that alone
    "opd-verbose": {"objective": OPD},
    "mpd": {"objective": OPD, "source": REWRITES},
    "mpd-forward-kl": {"objective": OPD | {"divergence": "forward_kl"}, "source": REWRITES},
    "mpd-and-nll": {"objective": [OPD, NLL], "source": REWRITES},
    "mpd-nll": {"objective": NLL, "source": REWRITES},
    "mpd-nll-correct": {"objective": NLL, "source": REWRITES | {"only_correct": True}},
}
VARIANTS |= {
    name: {"student": VERBOSE / "student", "teacher": VERBOSE / "teacher", "learning_rate": 4e-4, "longest": 128}
    | variant
    for name, variant in VERBOSE_VARIANTS.items()
}


def recipe(name: str, seed: int, data: Path, base_url: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    """One run: 24 prompts of 2 completions a step."""
    variant = dict(VARIANTS[name])
    student, model = (str(variant.pop(key, MODELS / own)) for key, own in (("student", "base"), ("teacher", "teacher")))
    longest, source = variant.pop("longest", 80), variant.pop("source", {"type": "student"})
    teacher: dict[str, Any] = {"type": "local", "model": model, "dtype": "float32"}
    if base_url is not None:
        teacher = {"type": "server", "base_url": base_url, "model": "teacher", "tokenizer": model, "concurrency": 64}
    return {
        "student": {"model": student},
        "teacher": teacher,
        "data": {"prompts": str(data / "train.jsonl")},
        "rollout": {
            "source": source,
            "engine": {"type": "hf", "cache_tokens": 131072},
            "group_size": 2,
            "max_completion_length": longest,
            **changes.get("rollout", {}),
        },
        "evaluation": evaluation_options(data / "held_out.jsonl") | {"max_completion_length": longest},
        "output_dir": str(data / name),
        "prompts_per_step": 24,
        "max_steps": 100,
        "lr_scheduler_type": "constant",
        "health_tokens": 0,
        "save_steps": 1000,
        "eval_steps": 50,
        "seed": seed,
        **variant,
        **{key: value for key, value in changes.items() if key != "rollout"},
    }


@contextlib.contextmanager
def random_chunks(seed: int) -> Iterator[None]:
    """OmniOPD's chunks start at random tokens instead of those of highest entropy."""
    place, generator = omni_opd.place_chunks, torch.Generator().manual_seed(seed)

    def at_random(order: Iterable[int], length: int, **options: int) -> tuple[int, ...]:
        return place(torch.randperm(length, generator=generator).tolist(), length, **options)

    with patch.object(omni_opd, "place_chunks", at_random):
        yield


def run(name: str, seed: int, base_url: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    write_jsonl(folder / "train.jsonl", sums(TRAINING_PROBLEMS, seed=1, held_out=False))
    write_jsonl(folder / "held_out.jsonl", sums(HELD_OUT_PROBLEMS, seed=2, held_out=True))
    with random_chunks(seed) if name in RANDOM else contextlib.nullcontext():
        done = run_recipe(parse_recipe(recipe(name, seed, folder, base_url, changes)))
    steps, scores = (read_jsonl(done.run_folder / f"{file}.jsonl") for file in ("metrics", "evaluations"))
    shutil.rmtree(folder)
    tokens = "teacher/prompt_tokens/sum" if name == "sampled" else "teacher/completion_tokens/sum"
    return {
        "variant": name,
        "seed": seed,
        "changes": changes,
        "server": base_url is not None,
        "avg_at_4": {row["step"]: [round(row[f"avg_at_k{end}"], 4) for end in ("", "_low", "_high")] for row in scores},
        "length": {row["step"]: round(row["mean_length"], 1) for row in scores},
        "teacher_tokens": sum(row.get(tokens, 0) for row in steps),
        "requests": sum(row.get("teacher/requests/sum", 0) for row in steps),
        "first_and_last": [
            {key: value for key, value in row.items() if key.startswith(("omni/", "rewrite/", "train/"))}
            for row in (steps[0], steps[-1])
        ],
        "minutes": round(done.result.seconds / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []])
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and do nothing else")
    parser.add_argument("--base-url", help="of a server with the teacher; without one it runs in this process")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--changes", type=json.loads, default={}, help="keys of the recipe, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.table:
        print(table(read_runs(given.out)))
        return
    if not given.variants:
        parser.error(f"name at least one variant: {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    for seed in given.seeds:
        for name in given.variants:
            key = (name, seed, given.changes, given.base_url is not None)
            if key in [(row["variant"], row["seed"], row["changes"], row["server"]) for row in read_runs(given.out)]:
                continue
            row = run(name, seed, given.base_url, given.changes)
            print(json.dumps(row), flush=True)
            # read again: several of these commands may run at once
            runs = [*read_runs(given.out), row]
            given.out.write_text(json.dumps({"runs": runs, **describe_machine()}, indent=2) + "\n")


def read_runs(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["runs"] if file.is_file() else []


def table(runs: list[dict[str, Any]]) -> str:
    """avg@4 and length at the end, mean over seeds and of every seed; thousands of tokens the teacher wrote or read."""
    lines = [
        "| | teacher | avg@4 | of seeds | mean length | of seeds | teacher's tokens (thousands) |",
        "|---|---|---|---|---|---|---|",
    ]
    unchanged = sorted((row for row in runs if not row["changes"]), key=lambda row: row["seed"])
    for name, server in dict.fromkeys((row["variant"], row["server"]) for row in unchanged):
        found = [row for row in unchanged if (row["variant"], row["server"]) == (name, server)]
        accuracies = [row["avg_at_4"][max(row["avg_at_4"], key=int)][0] for row in found]
        lengths = [row["length"][max(row["length"], key=int)] for row in found]
        tokens = statistics.mean(row["teacher_tokens"] for row in found) / 1000
        lines.append(
            f"| `{name}` | {'served' if server else 'in process'} | {statistics.mean(accuracies):.3f} | {', '.join(f'{x:.3f}' for x in accuracies)} "
            f"| {statistics.mean(lengths):.1f} | {', '.join(f'{x:.1f}' for x in lengths)} | {tokens:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
