"""Cost of the exact reverse KL over a large vocabulary: ours, chunk by chunk, against the plain formula.

Forward and backward from hidden states and LM heads, N=1024 tokens, student width 896, teacher width 1536, V=151,936 (the
Qwen2.5 shapes), float32, gradient to the student's states and head. Both are timed in turn in one run; peak memory is the
most that tensors hold above the inputs. A second, small shape shows what chunking costs where it is not needed.

    python benchmarks/kl_cost.py
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from memory import peak_gib
from oprd.data.batching import collate
from oprd.losses.chunked import chunk_rows
from oprd.losses.divergences import reverse_kl
from oprd.objectives.opd import OPD
from oprd.train.run_folder import describe_machine
from oprd.types import HiddenStates, LMHead, Targets

ROOT = Path(__file__).parents[1]
SHAPES = {"large": (1024, 896, 1536, 151_936), "small": (256, 128, 128, 262)}
ROUNDS = {"large": 2, "small": 30}


def make(rows: int, width: int, teacher_width: int, vocabulary: int) -> dict[str, Callable[[], Tensor]]:
    """Two ways to the same loss; each returns the gradient of the student's states."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * width**-0.5).requires_grad_()
    teacher_hidden = torch.randn(rows, teacher_width)
    teacher_weight = torch.randn(vocabulary, teacher_width) * teacher_width**-0.5
    objective, batch = OPD(), collate([[0]], [[0] * rows], pad_id=0, device=hidden.device)
    (spec,) = objective.student_taps.hidden

    def finish(values: Tensor) -> Tensor:
        values.mean().backward()
        assert hidden.grad is not None
        grad = hidden.grad
        hidden.grad = weight.grad = None
        return grad

    def plain() -> Tensor:
        return finish(reverse_kl(hidden @ weight.T, teacher_hidden @ teacher_weight.T))

    def ours() -> Tensor:
        student = HiddenStates(hidden={spec: hidden}, head=LMHead(weight=weight), batch=batch)
        teacher = HiddenStates(hidden={spec: teacher_hidden}, head=LMHead(weight=teacher_weight), batch=batch)
        return finish(objective.per_token(student, Targets(teacher=teacher)))

    return {"plain": plain, "ours": ours}


def timed(work: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str) -> dict[str, object]:
    rows, width, teacher_width, vocabulary = SHAPES[name]
    ways = make(rows, width, teacher_width, vocabulary)
    first = {way: work() for way, work in ways.items()}
    error = float((first["ours"] - first["plain"]).norm() / first["plain"].norm())
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS[name]):
        for way, work in ways.items():
            seconds[way].append(timed(work))
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "shape": {"N": rows, "D_student": width, "D_teacher": teacher_width, "V": vocabulary, "dtype": "float32"},
        "chunk_rows": chunk_rows(vocabulary, torch.device("cpu")),
        "seconds_median": {way: round(statistics.median(values), 4) for way, values in seconds.items()},
        "time_ratio_ours_to_plain": {
            "median": round(statistics.median(ratios), 3),
            "all": [round(r, 3) for r in ratios],
        },
        "peak_gib": {way: round(peak_gib(work), 3) for way, work in ways.items()},
        "relative_gradient_difference": error,
    }


def main() -> None:
    torch.set_num_threads(2)
    result = {name: measure(name) for name in SHAPES}
    print(json.dumps(result, indent=2))
    out = ROOT / "benchmarks" / "results" / "kl_cost.json"
    out.write_text(json.dumps({"result": result, **describe_machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
