"""OPRD in one page without our loop: the miniature student learns for a few steps. `python examples/minimal_loop.py`"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oprd.demo
from oprd.algorithm import DistillModel, collect
from oprd.config.objectives import HiddenMSEConfig
from oprd.data.chat import render, stop_ids
from oprd.data.collate import collate
from oprd.demo.task import sums
from oprd.models import LanguageModel
from oprd.objectives import build_objectives
from oprd.rollout.base import Sampling
from oprd.rollout.hf import HFEngine
from oprd.teacher.local import LocalTeacher
from oprd.types import Message, Prompt, PromptBatch

MODELS = Path(oprd.demo.__file__).parent / "models"
STEPS, PROMPTS, GROUP = 10, 16, 2


def load(name: str) -> LanguageModel:
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    return LanguageModel(model=model, tokenizer=AutoTokenizer.from_pretrained(MODELS / name), name=name)


def prompt(row: int, text: str, lm: LanguageModel) -> Prompt:
    messages = (Message(role="user", content=text),)
    return Prompt(row=row, messages=messages, token_ids=render(lm.tokenizer, messages))


def main() -> list[float]:
    student = load("base")
    teacher = LocalTeacher(load("teacher"), context=256)
    objectives = build_objectives(HiddenMSEConfig(tokens="all"), blocks=student.num_blocks, vocabulary=262)
    model = DistillModel(student, objectives)
    engine = HFEngine(student, stop_ids(student.tokenizer, student.model.generation_config), max_sequences=64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=80, samples=GROUP)
    losses = []
    for step in range(STEPS):
        problems = sums(PROMPTS, seed=step, held_out=False)
        prompts = PromptBatch(prompts=tuple(prompt(i, p.problem, student) for i, p in enumerate(problems)))
        _, rollouts = collect(engine, teacher, prompts, sampling, seed=step)  # the student writes
        targets = teacher.targets(rollouts, model.readings, head=False)  # the teacher answers
        batch = collate(
            [p.token_ids for p in rollouts.prompts],
            rollouts.completion_ids,
            pad_id=student.pad_id,
            device=student.device,
        )
        (per_token,) = model(batch, targets)  # the student learns
        loss = per_token.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(
            f"step {step + 1}: loss {loss.item():.3f}, {sum(rollouts.lengths) / len(rollouts):.0f} tokens a completion"
        )
    return losses


if __name__ == "__main__":
    main()
