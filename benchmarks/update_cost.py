"""Cost of an OPRD update against its lower bound: `python benchmarks/update_cost.py`.

SmolLM2-135M, full weights, float32. The update is teacher forward, student forward, loss and backward. The floor is the
bare forward of the teacher's blocks, then forward and backward of the student's blocks. Both are timed in turn in one run;
peak memory is the most that tensors hold above the two loaded models.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory import peak_gib
from oprd.data.batching import collate
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts
from oprd.models.probe import freeze_unreached
from oprd.objectives.oprd import OPRD
from oprd.student import DistillModel
from oprd.train.run_folder import describe_machine
from oprd.types import Targets

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "smollm2"
COMPLETIONS, PROMPT, LENGTH = 4, 64, 192
ROUNDS = 7


def load(name: str) -> LanguageModel:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(MODEL), name=name)


def make() -> tuple[Callable[[], None], Callable[[], None]]:
    """One update and one floor."""
    student, teacher = load("student"), load("teacher")
    teacher.model.eval().requires_grad_(False)
    shape = (COMPLETIONS, PROMPT + LENGTH)
    ids = torch.randint(100, 40_000, shape, generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids], pad_id=0, device=student.device)
    objective = OPRD().bind(ModelFacts.read(student.model, student.tokenizer))
    model, frozen = DistillModel(student, [objective]), FrozenModel(teacher)
    freeze_unreached(student, model.taps)

    def update() -> None:
        (values,) = model(batch, Targets(teacher=frozen.hidden(batch, objective.teacher_taps)))
        (values.sum() / len(values)).backward()
        model.zero_grad()

    def floor() -> None:
        with torch.no_grad():
            teacher.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        out = student.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        out.last_hidden_state.sum().backward()
        model.zero_grad()

    return update, floor


def main() -> None:
    torch.set_num_threads(2)
    update, floor = make()
    update(), floor()
    ratios, seconds = [], {"update": [], "floor": []}
    for _ in range(ROUNDS):
        for name, work in (("floor", floor), ("update", update)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
        ratios.append(seconds["update"][-1] / seconds["floor"][-1])
    memory = {"floor": round(peak_gib(floor), 3), "update": round(peak_gib(update), 3)}
    result = {
        "seconds_median": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "peak_gib": memory,
        "peak_ratio": round(memory["update"] / memory["floor"], 3),
        "setting": {
            "completions": COMPLETIONS,
            "prompt_tokens": PROMPT,
            "completion_tokens": LENGTH,
            "dtype": "float32",
        },
    }
    print(json.dumps(result, indent=2))
    out = ROOT / "benchmarks" / "results" / "update_cost.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"result": result, **describe_machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
