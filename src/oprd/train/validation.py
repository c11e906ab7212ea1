"""How good the weights in place are on a few training prompts: what a search compares."""

import math
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor

from oprd.config.recipe import EffOPDConfig
from oprd.data.chat import decode
from oprd.data.collate import split_by_tokens
from oprd.evaluate.verify import Verifier
from oprd.rollout.base import Sampling
from oprd.seeds import derive_seed
from oprd.train.build import Run
from oprd.train.extrapolation import Scores, validation_prompts
from oprd.train.update import student_batch, teacher_targets
from oprd.types import PromptBatch, Rollouts, States, TeacherTargets


def validate(run: Run, config: EffOPDConfig, verifier: Verifier | None, sampling: Sampling, step: int) -> Scores:
    """Score the weights in place: one value per validation prompt, the same on every process.

    Seeds depend on the step alone, so the candidates of one search write with the same random numbers. Processes share
    the prompts, except under sharding, where each runs every forward pass and does all.
    """
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    if run.engine.same_steps:
        rank, processes = 0, 1
    prompts = validation_prompts(config, run.prompts, run.recipe.seed)
    mine = prompts[rank::processes]
    rows: list[tuple[int, float | None, int]] = []
    if mine:
        seed = derive_seed(run.recipe.seed, "extrapolation", step, rank)
        written = run.engine.generate(PromptBatch(prompts=mine), sampling, seed=seed)
        if run.engine.same_steps:
            # a last bit on another GPU can lead to another token, and then to another number of passes than the others make
            written = gather_object([written])[0]
        if config.score == "accuracy":
            values = _accuracies(run, written, verifier)
        else:
            with torch.random.fork_rng(devices=[]):  # an objective that draws does so alike for every candidate
                torch.manual_seed(seed)
                values = _minus_objective(run, written)
        rows = [(prompt.row, _mean([value for row, value in values if row == prompt.row]), 0) for prompt in mine]
        rows[0] = (*rows[0][:2], sum(written.lengths))
    gathered = gather_object(rows)[: len(prompts)]  # sharded: every process has all; the first one's count
    by_row = {row: value for row, value, _ in gathered}
    values = [by_row[prompt.row] for prompt in prompts]
    # a completion without a supervised token must not look like a perfect one
    worst = min((value for value in values if value is not None), default=-math.inf)
    return Scores(
        values=tuple(worst if value is None else value for value in values),
        tokens=sum(tokens for *_, tokens in gathered),
    )


def _accuracies(run: Run, written: Rollouts, verifier: Verifier | None) -> list[tuple[int, float | None]]:
    """(row, 1 if right else 0) of each completion."""
    assert verifier is not None
    texts = [decode(run.lm.tokenizer, ids) for ids in written.completion_ids]
    verdicts = verifier.verify(texts, [str(prompt.answer) for prompt in written.prompts])
    return [(prompt.row, float(verdict.correct)) for prompt, verdict in zip(written.prompts, verdicts, strict=True)]


def _mean(values: list[float | None]) -> float | None:
    """Of one prompt's completions; None if one of them has nothing to score."""
    known = [value for value in values if value is not None]
    return sum(known) / len(values) if len(known) == len(values) else None


def _minus_objective(run: Run, written: Rollouts) -> list[tuple[int, float | None]]:
    """(row, minus the weighted objectives' mean over the supervised tokens) of each completion; None without any."""
    rows: list[tuple[int, float | None]] = []
    run.stage.model.eval()
    for micro in split_by_tokens(run.teacher.prepare(written), run.recipe.micro_batch_tokens):
        distill, then = run.stage.distill, partial(_per_token, run, teacher_targets(run, micro))
        values = run.read(student_batch(run, micro), distill.readings, distill.uses_head, then)
        totals: list[float | None] = [0.0] * len(micro)
        for objective, value in zip(run.stage.objectives, values, strict=True):
            for i, part in enumerate(value.split(objective.supervised(micro))):
                so_far = totals[i]
                if so_far is not None:
                    totals[i] = so_far - objective.coefficient * float(part.double().mean()) if len(part) else None
        rows += [(prompt.row, total) for prompt, total in zip(micro.prompts, totals, strict=True)]
    for objective in run.stage.objectives:
        objective.tallies()  # what was counted here is not the next step's
    return rows


def _per_token(run: Run, targets: TeacherTargets, states: States) -> list[Tensor]:
    return [objective.per_token(states, targets).cpu() for objective in run.stage.objectives]
