"""Rollouts of a step: what the student writes and when, and the updates that are made on them."""

from dataclasses import replace

import torch

from oprd.algorithm import Update
from oprd.clock import Clock
from oprd.models.generate import Sampling
from oprd.seeds import derive_seed
from oprd.train.setup import Parts
from oprd.types import Rollouts


def sampling_at(parts: Parts, step: int) -> Sampling:
    """How the student writes at a step."""
    rollout = parts.recipe.rollout
    return rollout.sampling(samples=rollout.group_size, max_new_tokens=rollout.length_at(step))


def few_fresh(parts: Parts, written: Rollouts, step: int) -> Rollouts:
    """The beginnings of a few completions, by which the engine's weights are checked where the step's are older."""
    prompts = written.prompts[:: parts.recipe.rollout.group_size][:4]
    sampling = replace(
        sampling_at(parts, step), samples=1, max_new_tokens=min(64, parts.recipe.rollout.length_at(step))
    )
    seed = derive_seed(parts.recipe.seed, "check", step)
    return parts.engine.generate(prompts, sampling, seed=seed, places=parts.ranks.places(prompts))


def write_ahead(parts: Parts, step: int) -> None:
    """Let the student begin with the rollouts of a step to come, if the recipe asks for that."""
    if parts.recipe.rollout.rollouts_ahead and step <= parts.recipe.max_steps:
        parts.method.source.write_ahead(parts.sampler.batch(step - 1), sampling_at(parts, step), step)


def updates_on(parts: Parts, rollouts: Rollouts, step: int, clock: Clock) -> list[Update]:
    """The optimizer updates on one step's rollouts; all but the first are off-policy."""
    method, count = parts.method, parts.recipe.rollout.updates_per_rollout
    weighted = any(objective.importance_weighted for objective in method.student.objectives)
    off_policy = (count > 1 or rollouts.staleness > 0) and weighted and rollouts.written_by == "student"
    if not off_policy or method.student.lm.pair_stops:  # an engine does not count the ids that end a turn as one
        rollouts = replace(rollouts, sampling_logprobs=None)
    if off_policy and rollouts.sampling_logprobs is None:
        with clock.section("update"):
            rollouts = method.with_sampling_logprobs(rollouts)
    updates = list[Update]()
    for number in range(count):
        torch.manual_seed(derive_seed(parts.recipe.seed, "update", step, number, parts.ranks.rank))  # dropout, redraws
        updates.append(method.update(rollouts, step, clock))
    return updates
