"""A student that writes too much and a teacher that can say it briefly, for MPD: `python scripts/make_verbose_models.py student teacher`.

The student is the miniature base, taught to write nine of ten steps twice. The teacher is the miniature teacher, taught to
rewrite such texts briefly, and to solve problems in either way, half of them each: what it expects after a step depends on
how the steps before it are written. Both are written to runs/verbose; about 40 minutes of one core.
"""

import argparse
import random
from pathlib import Path

import torch
from make_demo_models import BATCH, BatchedMuon, Turns, batch_of, measure, train, worked
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.demo.run import MODELS
from oprd.demo.task import Sum, completion, sums

OUT = Path(__file__).parents[1] / "runs" / "verbose"
REPEATED, WRONG_SHARE = 0.9, 0.15
STUDENT_STEPS, TEACHER_STEPS = 300, 2000
"""The teacher forgets how to solve and has to learn it again: avg@4 0.446 after 700 steps, 0.185 at a third of the rate."""
STUDENT_SEED, TEACHER_SEED = 10_000, 20_000
LONGEST = 128


def verbose(brief: str, rng: random.Random) -> str:
    """Most steps written twice, the answer once."""
    *steps, answer = brief.splitlines()
    return "\n".join([line for step in steps for line in [step] * (1 + (rng.random() < REPEATED))] + [answer])


def verbose_solutions(seed: int) -> list[Turns]:
    rng = random.Random(seed)
    return [(p.problem, verbose(worked(p, WRONG_SHARE, rng), rng)) for p in sums(BATCH, seed, held_out=False)]


def rewriting(problem: Sum, rng: random.Random) -> Turns:
    """Every other text has a slip, which is kept."""
    brief = worked(problem, 0.5, rng)
    return f"{problem.problem}\n{verbose(brief, rng)}", brief


def lessons(seed: int) -> list[Turns]:
    """Half of them rewritings, a quarter brief solutions, a quarter verbose ones."""
    rng = random.Random(seed)
    turns: list[Turns] = []
    for i, problem in enumerate(sums(BATCH, seed, held_out=False)):
        if i % 2:
            turns.append(rewriting(problem, rng))
        else:
            turns.append((problem.problem, completion(problem) if i % 4 else verbose(completion(problem), rng)))
    return turns


@torch.no_grad()
def rewritten_well(folder: Path) -> float:
    """Share of 200 held-out texts of which the teacher's likeliest rewriting is the right one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng, problems = random.Random(0), sums(200, seed=3, held_out=True)
    right = 0
    for problem in problems:
        ids, labels = batch_of(tokenizer, [rewriting(problem, rng)])
        likeliest = model(input_ids=ids).logits[0, :-1].argmax(-1)
        right += bool(((likeliest == labels[0, 1:]) | (labels[0, 1:] < 0)).all())
    return right / len(problems)


MAKES = {
    "student": ("base", verbose_solutions, STUDENT_STEPS, STUDENT_SEED, False),
    "teacher": ("teacher", lessons, TEACHER_STEPS, TEACHER_SEED, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pair of models that MPD is measured on.")
    parser.add_argument("models", nargs="+", choices=MAKES)
    torch.set_num_threads(1)  # sums of floats in one order: the same weights again
    for name in parser.parse_args().models:
        start, draw, steps, seed, decay = MAKES[name]
        tokenizer = AutoTokenizer.from_pretrained(MODELS / start)
        model = AutoModelForCausalLM.from_pretrained(MODELS / start, dtype=torch.float32)
        train(model, tokenizer, draw, steps=steps, first_seed=seed, decay=decay, muon=BatchedMuon)
        model.to(torch.bfloat16).save_pretrained(OUT / name)
        tokenizer.save_pretrained(OUT / name)
        print(f"{name}: {measure(OUT / name, LONGEST)}", flush=True)
        if draw is lessons:
            print(f"rewritten well: {rewritten_well(OUT / name):.3f}", flush=True)


if __name__ == "__main__":
    main()
