"""The closed-form fit against the authors' gradient fit on the same rows, and its memory: `python benchmarks/bridge_fit.py`.

Miniature base to `wide_teacher`, the base's own completions. For every pair of blocks: held-out mean cosine at every rank of
both fits, and their seconds once the rows are there. The closed form is charged with adding up its sums and gives every rank
and the canonical correlations; the gradient fit is charged with one map of full rank, and with one map for each of RANKS, which
is what choosing the rank costs with it. Memory: peak of a process each that adds up the sums of n and of 10 n rows of width 1024.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from oprd.bridge.features import Features
from oprd.bridge.fit import Rows, is_held_out
from oprd.bridge.gradient import BATCH_ROWS, EPOCHS, fit_by_gradient
from oprd.bridge.moments import Moments
from oprd.bridge.solve import auto_rank, cosine_sums, solve
from oprd.config.reading import parse_recipe
from oprd.demo.run import MODELS
from oprd.demo.task import sums, write_jsonl
from oprd.train.check import Given
from oprd.train.fit_bridge import prepare_fit
from oprd.train.run_folder import describe_machine

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "bridge_fit"
RESULT = ROOT / "benchmarks" / "results" / "bridge_fit.json"
PROMPTS = 512
RANKS = (2, 4, 8, 16, 32, 128)
MEMORY_ROWS, MEMORY_WIDTH, MEMORY_BATCH = 20_000, 1024, 1000


def collect() -> dict[int, tuple[Rows, Rows]]:
    """Rows to fit and held-out rows of every pair, by the student's block."""
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUT / "prompts.jsonl", sums(PROMPTS, seed=1, held_out=False))
    tree = {
        "student": {"model": str(MODELS / "base")},
        "teacher": {"type": "local", "model": str(MODELS / "wide_teacher"), "dtype": "float32"},
        "objective": {"type": "oprd_bridge", "bridge": str(OUT / "none"), "tokens": "all", "layers": "all"},
        "data": {"prompts": str(OUT / "prompts.jsonl")},
        "rollout": {"max_completion_length": 80},
        "output_dir": str(OUT / "run"),
    }
    job = prepare_fit(parse_recipe(tree), Given())
    found: dict[int, dict[bool, list[Rows]]] = {pair.block: {False: [], True: []} for pair in job.both.pairs}
    for number, batch in enumerate(job.batches):
        rollouts = job.both.teacher.prepare(job.write(number))
        size = len(rollouts) // len(batch)
        for aside in (False, True):
            some = [i for i in range(len(rollouts)) if is_held_out(batch[i // size], 0.1) == aside]
            for rows in job.both.rows(rollouts.take(some)):
                for block, pair in rows.items():
                    found[block][aside].append(pair)
        print(f"rollouts {number + 1}/{len(job.batches)}", flush=True)
    return {block: (_joined(parts[False]), _joined(parts[True])) for block, parts in found.items()}


def _joined(parts: list[Rows]) -> Rows:
    student, teacher = (torch.cat(side) for side in zip(*parts, strict=True))
    return student, teacher


def compare(fit: Rows, held_out: Rows) -> dict[str, Any]:
    rank = min(fit[0].shape[1], fit[1].shape[1])
    start = time.perf_counter()
    none = Features.random(fit[1].shape[1], 0, seed=0)
    moments, measuring = (Moments.zeros(fit[0].shape[1], fit[1].shape[1]) for _ in range(2))
    moments.add(*fit)
    measuring.add(*held_out)
    closed = solve(moments, measuring, none, max_rank=rank, name="pair")
    closed_s = time.perf_counter() - start
    seconds = {}
    for r in RANKS:
        start = time.perf_counter()
        p_s, p_t, mean = fit_by_gradient(*fit, max_rank=r, seed=0)
        seconds[r] = time.perf_counter() - start
    gradient_s = seconds[rank]

    def cosine(p_s: Any, p_t: Any, m_s: Any, m_t: Any) -> list[float]:
        u, v = (held_out[0].double() - m_s) @ p_s.double().T, (held_out[1].double() - m_t) @ p_t.double().T
        return (cosine_sums(u, v) / len(u)).tolist()

    ours = cosine(closed.student_projection, closed.teacher_projection, closed.student_mean, closed.teacher_mean)
    theirs = cosine(p_s, p_t, 0.0, mean.double())
    return {
        "rows": len(fit[0]),
        "held_out_rows": len(held_out[0]),
        "auto_rank": auto_rank(closed.canonical),
        "closed_form_s": round(closed_s, 4),
        "gradient_s": round(gradient_s, 3),
        "gradient_each_rank_s": round(sum(seconds.values()), 3),
        "smallest_lead_in_cosine": round(min(a - b for a, b in zip(ours, theirs, strict=True)), 5),
        "closed_form_cosine": [round(x, 4) for x in ours],
        "gradient_cosine": [round(x, 4) for x in theirs],
    }


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
