"""What a step learns on: the student's completions, or the dataset's."""

import dataclasses
from collections.abc import Sequence

import torch

from oprd.algorithm import collect
from oprd.config.recipe import RolloutConfig
from oprd.data.chat import encode, end_of_turn
from oprd.data.collate import split_by_tokens
from oprd.kernels.chunked import sampled_logprobs
from oprd.rollout.base import Sampling
from oprd.seeds import derive_seed
from oprd.train.build import Run
from oprd.train.processes import gather
from oprd.train.update import student_batch
from oprd.types import Prompt, Reading, Rollouts, States, TokenSelection, concatenate


def rollouts_of_step(run: Run, step: int) -> tuple[Rollouts, Rollouts]:
    """What was written and what is learned on: the student's completions, or on an off-policy step the dataset's (GKD)."""
    recipe = run.recipe
    prompts = run.sampler.batch(step - 1)
    draw = torch.Generator().manual_seed(derive_seed(recipe.seed, "lambda", step))
    if float(torch.rand((), generator=draw)) >= recipe.rollout.lambda_on_policy:
        given = _given_rollouts(run, prompts.prompts, recipe.rollout.length_at(step))
        return given, run.teacher.prepare(given)
    seed = derive_seed(recipe.seed, "rollout", step, run.accelerator.process_index)
    return collect(
        run.engine,
        run.teacher,
        prompts,
        sampling_with(recipe.rollout, max_tokens=recipe.rollout.length_at(step)),
        seed=seed,
    )


def sampling_with(rollout: RolloutConfig, *, max_tokens: int, samples: int | None = None) -> Sampling:
    """How the student writes; `group_size` samples unless another number is given."""
    return Sampling(
        temperature=rollout.sampling_temperature,
        top_p=rollout.top_p,
        max_tokens=max_tokens,
        samples=samples or rollout.group_size,
    )


def _given_rollouts(run: Run, prompts: Sequence[Prompt], longest: int) -> Rollouts:
    """The dataset's own completions, ended by the stop token unless they are too long."""
    tokenizer = run.lm.tokenizer
    stop = end_of_turn(tokenizer, run.stop_ids)
    ids = [(*encode(tokenizer, prompt.completion or ""), stop) for prompt in prompts]
    return Rollouts(
        prompts=tuple(prompts),
        completion_ids=tuple(row[:longest] for row in ids),
        finished=tuple(len(row) <= longest for row in ids),
        sampled=False,
        max_tokens=longest,
    )


def with_logprobs(run: Run, rollouts: Rollouts) -> Rollouts:
    """The rollouts, in another order, with the log-probabilities of their tokens under the weights that wrote them.

    By the trainer's own forward pass, because an engine's may differ by its precision.
    """
    reading = Reading(block="last", at="prediction", tokens=TokenSelection(keep="all"))

    def sampled(states: States) -> torch.Tensor:
        assert states.head is not None
        ids = states.batch.sampled_ids(reading.tokens)
        return sampled_logprobs(states.hidden[reading], states.head, ids).cpu()

    micros = split_by_tokens(rollouts, run.recipe.micro_batch_tokens)
    run.stage.model.eval()
    done = []
    for number in range(int(gather(run, [float(len(micros))]).max())):
        micro = micros[number] if number < len(micros) else micros[0]  # sharded: equal passes everywhere
        logprobs = run.read(student_batch(run, micro), (reading,), True, sampled).split(micro.lengths)
        done.append(dataclasses.replace(micro, logprobs=tuple(tuple(row.tolist()) for row in logprobs)))
    return concatenate(done[: len(micros)])
