# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""The method: the student writes, the teacher answers on what the student wrote, the student learns from the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_

import torch

from oprd.clock import Clock
from oprd.data.batching import balanced, concatenate, split_by_tokens, student_batch
from oprd.distributed import Ranks
from oprd.errors import TrainingStopped
from oprd.losses.chunked import logprobs_of
from oprd.models.generate import Sampling
from oprd.objectives.base import Objective, StepContext
from oprd.rollout.sources import Source
from oprd.student import Student
from oprd.teacher.base import Teacher
from oprd.teacher.local import Reference
from oprd.types import ALL_TOKENS, Batch, HiddenSpec, Prompt, Rollouts, Taps, Targets


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Who writes, who judges, who learns."""

    source: Source
    teacher: Teacher
    reference: Reference | None
    """The model before training, or the one the teacher was trained from; None where no objective asks for it."""
    student: Student
    ranks: Ranks
    micro_batch_tokens: int
    """Padded positions of one forward and backward pass on one rank; a longer completion goes alone."""

    def collect(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[Rollouts, Rollouts]:
        """(what this rank wrote first, what it learns on with all annotations); steps are counted from 1.

        What all ranks learn on is dealt out anew, so that none waits for the one with the longest completions.
        """
        written, rollouts = self.ranks.together(lambda: self.source.rollouts(prompts, sampling, step))
        rollouts = self.annotate(rollouts)
        if self.ranks.size > 1:
            everything = concatenate(self.ranks.gather_objects([rollouts]))
            rollouts = everything.take(balanced(everything.positions, self.ranks.size)[self.ranks.rank])
        return written, rollouts

    def annotate(self, rollouts: Rollouts) -> Rollouts:
        """What is asked once per step: alignments, a server's log-probabilities, continuations."""
        rollouts = self.ranks.together(partial(self.teacher.annotate, rollouts))
        context = StepContext(
            student=self.student,
            teacher=self.teacher,
            ranks=self.ranks,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        for objective in self.student.objectives:
            rollouts = objective.annotate(rollouts, context)
        return rollouts

    def update(self, rollouts: Rollouts, step: int, clock: Clock) -> "Update":
        """One optimizer step on the rollouts of all ranks.

        Each objective's weighted sum over tokens is divided once, by its total weight over all micro-batches and ranks:
        however the batch is split, the update is the same. A rank with fewer micro-batches repeats its first with weight 0.
        """
        student, ranks, objectives = self.student, self.ranks, self.student.objectives
        micros = ranks.in_step(split_by_tokens(rollouts, self.micro_batch_tokens, packed=student.lm.packs))
        totals = ranks.sum([objective.total_weight(rollouts) for objective in objectives])
        supervised = ranks.sum([float((o.weights(rollouts) != 0).sum()) for o in objectives])
        _check_teachable(rollouts, ranks)
        sums = torch.zeros(len(objectives), dtype=torch.float64)
        for number, (micro, own) in enumerate(micros, 1):
            with clock.section("teacher"):
                targets = self.targets(micro)
            with clock.section("update"), student.accumulate(last=number == len(micros)):
                losses = student.losses(self.batch(micro), targets)
                weighted = [
                    (loss * objective.weights(micro).to(loss) * own).sum()
                    for objective, loss in zip(objectives, losses, strict=True)
                ]
                terms = zip(objectives, weighted, totals, strict=True)
                student.backward(sum(o.weight_at(step) * x / max(total, 1e-9) for o, x, total in terms))  # type: ignore[arg-type]
            sums += torch.stack([x.detach().cpu().double() for x in weighted])
        with clock.section("update"):
            norm = student.clip_gradients()
            losses_of_step = [x / max(total, 1e-9) for x, total in zip(ranks.sum(sums.tolist()), totals, strict=True)]
            # where every answer of the teacher was lost or unusable there is nothing to learn, and no update is made
            finite = any(totals) and math.isfinite(norm) and all(map(math.isfinite, losses_of_step))
            student.optimizer_step(skip=not finite)
        return Update(
            losses=tuple(losses_of_step), supervised=tuple(map(int, supervised)), grad_norm=norm, finite=finite
        )

    def with_sampling_logprobs(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts, in another order, with the log-probabilities of their tokens under the weights in place."""
        spec, done = HiddenSpec(block="last", at="predicting", tokens=ALL_TOKENS), list[Rollouts]()
        for micro, own in self.ranks.in_step(split_by_tokens(rollouts, self.micro_batch_tokens)):
            batch = self.batch(micro)
            states = self.student.hidden(batch, Taps(hidden=(spec,), head=True))
            assert states.head is not None
            ids = batch.sampled_ids(ALL_TOKENS)
            rows = logprobs_of(states.hidden[spec], states.head, ids).cpu().split(micro.lengths)
            if own:
                done.append(replace(micro, sampling_logprobs=tuple(tuple(row.tolist()) for row in rows)))
        return concatenate(done)

    def targets(self, micro: Rollouts) -> Targets:
        """What the objectives compare the student with on a micro-batch; made just before use."""
        objectives = self.student.objectives
        found = self.teacher.targets(micro, reduce(or_, (o.teacher_taps for o in objectives), Taps()))
        reference_taps = reduce(or_, (o.reference_taps for o in objectives), Taps())
        reference = None if self.reference is None else self.reference.states(micro, reference_taps)
        return Targets(teacher=found.teacher, logprobs=found.logprobs, reference=reference)

    def batch(self, micro: Rollouts) -> Batch:
        """A micro-batch as the student reads it, on its device."""
        return student_batch(micro, pad_id=self.student.lm.pad_id, device=self.ranks.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimizer step, over all ranks."""

    losses: tuple[float, ...]
    """Weighted mean of each objective, before its own weight in the sum."""
    supervised: tuple[int, ...]
    """Tokens of each objective whose weight is not 0."""
    grad_norm: float
    """Before clipping."""
    finite: bool
    """False: the step was skipped."""


def term_names(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The objectives' metric names, numbered where a recipe has two of a kind."""
    names = [objective.metric for objective in objectives]
    return tuple(f"{n}_{names[: i + 1].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names))


def mean_update(updates: Sequence[Update]) -> Update:
    """The updates made with one rollout as one line: means of losses and norms of those that were not skipped."""
    made = [update for update in updates if update.finite] or updates
    n = len(made)
    return Update(
        losses=tuple(sum(losses) / n for losses in zip(*(update.losses for update in made), strict=True)),
        supervised=made[0].supervised,
        grad_norm=sum(update.grad_norm for update in made) / n,
        finite=made[0].finite,
    )


def _check_teachable(rollouts: Rollouts, ranks: Ranks) -> None:
    """Raise TrainingStopped if the completions of all ranks are empty, or none of their tokens is aligned."""
    if rollouts.alignments is None and not any(ranks.sum([float(sum(rollouts.lengths))])):
        raise TrainingStopped(
            "no token of this step is supervised: every completion is empty. Does the chat template end the prompt where "
            "the assistant starts to write, and is the stop token not the first thing it writes?"
        )
    aligned = [float(len(alignment.student_index)) for alignment in rollouts.alignments or ()]
    if rollouts.alignments is not None and not any(ranks.sum([sum(aligned)])):
        raise TrainingStopped(
            "no token of this step ends where one of the teacher's ends, so none is supervised. Does the student write "
            "text, does the teacher's tokenizer keep it as it is, and are completions longer than a word (length_schedule)?"
        )
