"""OPRD in one page without our loop: the miniature student learns for a few steps. `python examples/minimal_loop.py`"""

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd.demo
from oprd import OPRD
from oprd.data.batching import student_batch
from oprd.data.chat import render
from oprd.demo.task import sums
from oprd.models.generate import Sampling
from oprd.models.language_model import FrozenModel, LanguageModel
from oprd.models.loading import ModelFacts
from oprd.rollout.hf import HFEngine
from oprd.student import OptimizerSection, Student
from oprd.teacher.local import LocalTeacher
from oprd.types import Message, Prompt

MODELS = Path(oprd.demo.__file__).parent / "models"
STEPS, PROMPTS, GROUP = 10, 16, 2


def load(name: str, device: torch.device) -> LanguageModel:
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).to(device)
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(MODELS / name), name=name)


def make_prompt(row: int, text: str, lm: LanguageModel) -> Prompt:
    messages = (Message(role="user", content=text),)
    ids = render(lm.tokenizer, messages)
    return Prompt(row=row, messages=messages, token_ids=ids, teacher_token_ids=ids)


def main() -> list[float]:
    accelerator = Accelerator()
    lm = load("base", accelerator.device)
    teacher = LocalTeacher(FrozenModel(load("teacher", accelerator.device)), context=256)
    objective = OPRD(tokens="all").bind(ModelFacts.read(str(MODELS / "base")))
    settings = OptimizerSection(learning_rate=2e-3, lr_scheduler_type="constant", warmup_ratio=0.0)
    student = Student(lm, [objective], accelerator, settings, updates=STEPS)
    engine = HFEngine(student)
    sampling = Sampling(temperature=1.0, max_new_tokens=80, samples=GROUP)
    losses = []
    for step in range(STEPS):
        problems = sums(PROMPTS, seed=step, held_out=False)
        prompts = [make_prompt(i, one.problem, lm) for i, one in enumerate(problems)]
        rollouts = engine.generate(prompts, sampling, seed=step)  # the student writes
        targets = teacher.targets(rollouts, student.taps)  # the teacher answers
        batch = student_batch(rollouts, pad_id=lm.pad_id, device=accelerator.device)
        (per_token,) = student.losses(batch, targets)  # [N]: one value per token the student wrote
        student.backward(per_token.mean())
        student.clip_gradients()
        student.optimizer_step()  # the student learns
        losses.append(per_token.mean().item())
        print(
            f"step {step + 1}: loss {losses[-1]:.3f}, {sum(rollouts.lengths) / len(rollouts):.0f} tokens a completion"
        )
    return losses


if __name__ == "__main__":
    main()
