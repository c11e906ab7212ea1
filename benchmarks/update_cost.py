"""What an OPRD update costs beside what cannot be avoided: `python benchmarks/update_cost.py`.

SmolLM2-135M, full weights, float32. The update is teacher forward, student forward, loss and backward. The floor is the
bare forward of the teacher's blocks, then forward and backward of the student's blocks. Both are timed in turns in one
run; peak memory is what tensors hold at most above the two loaded models.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory import peak_gib
from oprd.algorithm import DistillModel
from oprd.config.objectives import HiddenMSEConfig
from oprd.data.collate import collate
from oprd.models import LanguageModel, freeze_unused, read_states
from oprd.objectives import build_objectives
from oprd.train.run_folder import describe_machine
from oprd.types import HiddenTargets

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "smollm2"
COMPLETIONS, PROMPT, LENGTH = 4, 64, 192
ROUNDS = 7


def load() -> tuple[LanguageModel, LanguageModel]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    student = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    return (
        LanguageModel(model=student, tokenizer=tokenizer, name="student"),
        LanguageModel(model=teacher, tokenizer=tokenizer, name="teacher"),
    )


def make():
    """One update, and one floor, as functions without arguments."""
    student, teacher = load()
    ids = torch.randint(
        100, 40_000, (COMPLETIONS, PROMPT + LENGTH), generator=torch.Generator().manual_seed(0)
    ).tolist()
    batch = collate([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids], pad_id=0, device=student.device)
    objectives = build_objectives(HiddenMSEConfig(), blocks=student.num_blocks, vocabulary=49_152)
    model = DistillModel(student, objectives)
    freeze_unused(student, student.num_blocks, head=False)

    def update() -> None:
        with torch.no_grad():
            states = read_states(teacher, batch, model.readings, head=False)
        (values,) = model(batch, HiddenTargets(hidden=states.hidden, head=None))
        del states
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
