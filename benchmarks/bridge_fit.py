"""The closed-form fit against the authors' gradient fit on the same rows, and its memory: `python benchmarks/bridge_fit.py`.

Miniature base to `wide_teacher`, the base's own completions. For every pair of blocks: held-out mean cosine at every rank of
both fits, and their seconds once the rows are there. The closed form is charged with adding up its sums and gives every rank
and the canonical correlations; the gradient fit is charged with one map of full rank, and with one map for each of RANKS,
which is what choosing the rank costs with it. Memory: peak of one process each that adds up the sums of n and of 10 n rows of
width 1024.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge_gradient_fit import BATCH_ROWS, EPOCHS, fit_by_gradient
from oprd.bridge.fit import is_held_out
from oprd.bridge.moments import Features, Moments
from oprd.bridge.solve import BlockMap, auto_rank, cosine_sums, solve
from oprd.demo.run import MODELS
from oprd.demo.task import sums, write_jsonl
from oprd.objectives.oprd_bridge import OPRDBridge
from oprd.recipe import parse_recipe
from oprd.train.fit_bridge import prepare_fit
from oprd.train.pair import Given
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "bridge_fit"
RESULT = ROOT / "benchmarks" / "results" / "bridge_fit.json"
PROMPTS = 512
RANKS = (2, 4, 8, 16, 32, 128)
"""The last is the smaller width: full rank."""
Rows = tuple[Tensor, Tensor]
"""States of student and teacher at the same tokens."""
MEMORY_ROWS, MEMORY_WIDTH, MEMORY_BATCH = 20_000, 1024, 1000


def collect() -> dict[int, tuple[Rows, Rows]]:
    """Rows to fit and held-out rows of every pair, by the student's block."""
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUT / "prompts.jsonl", sums(PROMPTS, seed=1, held_out=False))
    objective = OPRDBridge(bridge=str(OUT / "none"), tokens="all", layers="all")
    tree = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"},
        "objective": objective,
        "data": {"prompts": str(OUT / "prompts.jsonl")},
        "rollout": {"max_completion_length": 80},
        "output_dir": str(OUT / "run"),
    }
    job = prepare_fit(parse_recipe(tree), objective, Given())
    found: dict[int, tuple[list[Rows], list[Rows]]] = {block: ([], []) for block, _ in job.setting.blocks}
    for number, start in enumerate(range(0, len(job.prompts), job.batch_size)):
        prompts = job.prompts[start : start + job.batch_size]
        rollouts = job.teacher.annotate(job.write(prompts, number))
        size = len(rollouts) // len(prompts)
        for held_out in (False, True):
            some = [i for i in range(len(rollouts)) if is_held_out(start + i // size) == held_out]
            for rows in job.rows(rollouts.take(some)):
                for block, pair in rows.items():
                    found[block][held_out].append(pair)
        print(f"rollouts of {start + len(prompts)}/{len(job.prompts)} prompts", flush=True)
    return {block: (_joined(fit), _joined(held_out)) for block, (fit, held_out) in found.items()}


def _joined(parts: list[Rows]) -> Rows:
    student, teacher = (torch.cat(side) for side in zip(*parts, strict=True))
    return student, teacher


def compare(fit: Rows, held_out: Rows) -> dict[str, Any]:
    widths = fit[0].shape[1], fit[1].shape[1]
    start = time.perf_counter()
    moments, measuring = (Moments.zeros(*widths) for _ in range(2))
    moments.add(*fit)
    measuring.add(*held_out)
    closed = solve(moments, measuring, Features.random(fit[1], 0, seed=0), max_rank=min(widths), name="pair")
    closed_s = time.perf_counter() - start
    seconds = {}
    for r in RANKS:
        start = time.perf_counter()
        p_s, p_t, mean = (x.double() for x in fit_by_gradient(*fit, max_rank=r, seed=0))
        seconds[r] = time.perf_counter() - start
    gradient = BlockMap(student=p_s, student_mean=torch.zeros(widths[0]), teacher=p_t, teacher_mean=mean)
    ours, theirs = (_cosine(maps, held_out) for maps in (closed.projections, gradient))
    return {
        "rows": len(fit[0]),
        "held_out_rows": len(held_out[0]),
        "auto_rank": auto_rank(closed.canonical),
        "closed_form_s": round(closed_s, 4),
        "gradient_s": round(seconds[min(widths)], 3),
        "gradient_each_rank_s": round(sum(seconds.values()), 3),
        "smallest_lead_in_cosine": round(min(a - b for a, b in zip(ours, theirs, strict=True)), 5),
        "closed_form_cosine": [round(x, 4) for x in ours],
        "gradient_cosine": [round(x, 4) for x in theirs],
    }


def _cosine(maps: BlockMap, rows: Rows) -> list[float]:
    """Mean cosine of the two projections at every rank."""
    student, teacher = (x.double() for x in rows)
    u, v = (student - maps.student_mean) @ maps.student.T, (teacher - maps.teacher_mean) @ maps.teacher.T
    return (cosine_sums(u, v) / len(u)).tolist()


def peak_mib(rows: int) -> float:
    """Peak resident memory of a fresh process that adds up so many rows."""
    done = subprocess.run([sys.executable, __file__, str(rows)], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 1)


def add_rows(rows: int) -> None:
    moments = Moments.zeros(MEMORY_WIDTH, MEMORY_WIDTH)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rows // MEMORY_BATCH):
        moments.add(*torch.randn(2, MEMORY_BATCH, MEMORY_WIDTH, generator=generator))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def main() -> None:
    pairs = {str(block): compare(*rows) for block, rows in collect().items()}
    keys = ("closed_form_s", "gradient_s", "gradient_each_rank_s")
    total = {key: sum(pair[key] for pair in pairs.values()) for key in keys}
    result = {
        "pairs": pairs,
        "gradient_over_closed_form_time": round(total["gradient_s"] / total["closed_form_s"], 1),
        "gradient_each_rank_over_closed_form_time": round(total["gradient_each_rank_s"] / total["closed_form_s"], 1),
        "gradient": {"ranks": RANKS, "epochs": EPOCHS, "batch_rows": BATCH_ROWS},
        "peak_mib_by_rows": {str(n): peak_mib(n) for n in (MEMORY_ROWS, 10 * MEMORY_ROWS)},
        "row_bytes_if_kept_mib": round(10 * MEMORY_ROWS * MEMORY_WIDTH * 2 * 4 / 2**20),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"result": result, **describe_machine()}, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "pairs"}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        add_rows(int(sys.argv[1]))
    else:
        main()
