"""How good the weights in place are on a few training prompts: what a search of EffOPD compares."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from oprd.data.batching import split_by_tokens
from oprd.data.chat import texts_to_judge
from oprd.effopd import EffOPDConfig, Scores, validation_prompts
from oprd.seeds import derive_seed
from oprd.train.setup import Parts
from oprd.types import Rollouts


def validate(parts: Parts, config: EffOPDConfig, step: int) -> Scores:
    """Score the weights in place: one value per validation prompt, the same on every rank.

    Seeds depend on the step alone, so the candidates of one search write with the same random numbers. Ranks share the
    prompts, except under sharding, where each runs every forward pass and does all.
    """
    ranks, recipe = parts.ranks, parts.recipe
    rank, size = (0, 1) if ranks.sharded else (ranks.rank, ranks.size)
    prompts = validation_prompts(config, parts.prompts, recipe.seed)
    mine, places = prompts[rank::size], range(len(prompts))[rank::size]
    rows: list[tuple[int, float | None, int]] = []
    seed = derive_seed(recipe.seed, "extrapolation", step, 0)
    # the answer stands at the end: completions that a schedule still cuts short would all be wrong, and every tie accepted
    whole, rollout = config.score == "accuracy", recipe.rollout
    longest = rollout.max_completion_length if whole else rollout.length_at(step)
    sampling = rollout.sampling(samples=config.validation_samples, max_new_tokens=longest)
    with parts.engine.session():  # on every rank
        written = parts.engine.generate(mine, sampling, seed=seed, places=places)
    if mine:
        if ranks.sharded:
            # a last bit on another GPU can lead to another token, and then to another number of passes than the others make
            written = ranks.gather_objects([written])[0]
        if config.score == "accuracy":
            values = _accuracies(parts, written)
        else:
            with torch.random.fork_rng(devices=[]):  # an objective that draws does so alike for every candidate
                torch.manual_seed(seed)
                values = _minus_objective(parts, written, step)
        rows = [(prompt.row, _mean([value for row, value in values if row == prompt.row]), 0) for prompt in mine]
        rows[0] = (*rows[0][:2], sum(written.lengths))
    gathered = ranks.gather_objects(rows)[: len(prompts)]  # sharded: every rank has all; the first one's count
    by_row = {row: value for row, value, _ in gathered}
    found = [by_row[prompt.row] for prompt in prompts]
    # a completion without a supervised token must not look like a perfect one
    worst = min((value for value in found if value is not None), default=-math.inf)
    return Scores(
        values=tuple(worst if value is None else value for value in found),
        tokens=sum(tokens for *_, tokens in gathered),
    )


def _accuracies(parts: Parts, written: Rollouts) -> list[tuple[int, float | None]]:
    """(row, 1 if correct else 0) of each completion."""
    texts = texts_to_judge(parts.method.student.lm.tokenizer, written)
    verdicts = parts.verifier.verify(texts, [str(prompt.answer) for prompt in written.prompts])
    return [(prompt.row, float(verdict.correct)) for prompt, verdict in zip(written.prompts, verdicts, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    """Of one prompt's completions; None if one of them has nothing to score."""
    known = [value for value in values if value is not None]
    return sum(known) / len(values) if len(known) == len(values) else None


def _minus_objective(parts: Parts, written: Rollouts, step: int) -> list[tuple[int, float | None]]:
    """(row, minus the weighted objectives' means over the supervised tokens) of each completion; None without any."""
    method, objectives = parts.method, parts.method.student.objectives
    rows: list[tuple[int, float | None]] = []
    for micro in split_by_tokens(method.annotate(replace(written, sampling_logprobs=None)), method.micro_batch_tokens):
        losses = method.student.evaluate(method.batch(micro), method.targets(micro))
        totals: list[float | None] = [0.0] * len(micro)
        for objective, loss in zip(objectives, losses, strict=True):
            counts = [objective.tokens.count(length) for length in micro.lengths]
            weights = objective.weights(micro).to(loss)
            for i, (values, shares) in enumerate(zip(loss.split(counts), weights.split(counts), strict=True)):
                so_far, kept = totals[i], values[shares > 0]
                if so_far is not None:
                    mean = float(kept.cpu().double().mean()) if len(kept) else None
                    totals[i] = None if mean is None else so_far - objective.weight_at(step) * mean
        rows += [(prompt.row, total) for prompt, total in zip(micro.prompts, totals, strict=True)]
    for objective in objectives:
        objective.take_metrics()  # what was counted here is not the next step's
    return rows
