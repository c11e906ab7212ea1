"""The fit: the student writes completions, both models read them, and second moments add up; no hidden state is kept.

The mean cosine is no function of second moments, so both models read some held-out completions once more after the solve.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.file import Setting
from oprd.bridge.moments import Features, Moments
from oprd.bridge.solve import Solution, cosine_sums, solve
from oprd.data.batching import concatenate, split_by_tokens, student_batch
from oprd.errors import DataError
from oprd.losses.chunked import statistics
from oprd.models.language_model import Model
from oprd.teacher.local import LocalTeacher
from oprd.types import HiddenSpec, LMHead, Prompt, Rollouts, Taps

HELD_OUT = 0.1
"""Share of the prompts that only measure, as in the paper."""
STANDARD_ROWS = 2048
"""Rows that give mean and scale of the features."""
COSINE_COMPLETIONS = 512
"""Held-out completions that are read again: some thousands of rows, more than a mean cosine needs."""

Rows = Mapping[int, tuple[Float[Tensor, "N S"], Float[Tensor, "N T"]]]
"""States of student and teacher at the same tokens, by the student's block."""
Sums = dict[int, tuple[Features, Moments, Moments]]
"""Moments of the rows to fit and of the held-out ones, by the student's block; the teacher's rows with their features."""


def is_held_out(index: int, share: float = HELD_OUT) -> bool:
    """Whether the prompt at `index` only measures. Evenly spread whole prompts, so no completion is on both sides."""
    return int((index + 1) * share) > int(index * share)


def confidence(hidden: Float[Tensor, "N D"], head: LMHead) -> Float[Tensor, " N"]:
    """Probability of the most probable next token at each position. No gradient."""
    return statistics(lambda p, _: p.softmax(-1).amax(-1), hidden, head)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitJob:
    """A fit with everything checked and loaded."""

    student: Model
    teacher: LocalTeacher
    setting: Setting
    prompts: tuple[Prompt, ...]
    write: Callable[[Sequence[Prompt], int], Rollouts]
    """The student's completions of some prompts, each prompt's together and in order; the second argument is the batch's
    number."""
    batch_size: int
    """Prompts whose completions are generated together."""
    micro_batch_tokens: int

    @torch.no_grad()
    def rows(self, rollouts: Rollouts) -> Iterator[Rows]:
        """Aligned states of each micro-batch, where the student's confidence is at least the setting's. `rollouts` come
        from `teacher.annotate`."""
        tokens, least, lm = self.setting.tokens, self.setting.confidence, self.student.lm
        last = HiddenSpec(block="last", at="token", tokens=tokens)
        student, teacher = Taps(hidden=(last,), head=True) if least > 0 else Taps(), Taps()
        pairs = {}
        for pair in self.setting.blocks:
            own, other = (HiddenSpec(block=block, at="token", tokens=tokens) for block in pair)
            pairs[pair[0]] = own, other
            student, teacher = student | Taps(hidden=(own,)), teacher | Taps(hidden=(other,))
        for micro in split_by_tokens(rollouts, self.micro_batch_tokens):
            theirs = self.teacher.targets(micro, teacher).teacher
            assert theirs is not None
            batch = student_batch(micro, pad_id=lm.pad_id, device=lm.device)
            ours, aligned = self.student.hidden(batch, student), batch.aligned(tokens)
            sure: Tensor | slice = slice(None)
            if ours.head is not None:
                sure = confidence(ours.hidden[last][aligned], ours.head) >= least
            yield {
                block: (ours.hidden[own][aligned][sure], theirs.hidden[other].to(lm.device)[sure])
                for block, (own, other) in pairs.items()
            }


def fit(job: FitJob, *, max_rank: int, after_batch: Callable[[int], None]) -> dict[int, Solution]:
    """Maps and held-out numbers by the student's block; `after_batch` gets the rows fitted so far.

    Raises DataError for states that no bridge can be fitted to.
    """
    sums: Sums = {}
    again: list[Rollouts] = []
    for number, start in enumerate(range(0, len(job.prompts), job.batch_size)):
        asked = job.prompts[start : start + job.batch_size]
        rollouts = job.teacher.annotate(job.write(asked, number))
        sums = sums or _no_rows(job, rollouts)
        prompt_of = [start + i * len(asked) // len(rollouts) for i in range(len(rollouts))]
        for held_out in (False, True):
            some = rollouts.take([i for i, index in enumerate(prompt_of) if is_held_out(index) == held_out])
            for rows in job.rows(some):
                for block, (student, teacher) in rows.items():
                    features, *moments = sums[block]
                    moments[held_out].add(student, features(teacher))
        again.append(some.take(range(min(len(some), COSINE_COMPLETIONS - sum(map(len, again))))))
        after_batch(int(next(iter(sums.values()))[1].count))
    solutions = {}
    for block, other in job.setting.blocks:
        (features, fitted, measured), name = sums[block], f"block {block} of the student and {other} of the teacher"
        solutions[block] = solve(fitted, measured, features, max_rank=max_rank, name=name)
    cosines = {block: torch.zeros(len(s.projections.student), dtype=torch.float64) for block, s in solutions.items()}
    count = 0
    for rows in job.rows(concatenate(again)):
        for block, (student, teacher) in rows.items():
            maps = solutions[block].projections
            cosines[block] += cosine_sums(maps.of_student(student), maps.of_teacher(teacher))
        count += len(student)
    return {block: replace(s, cosine=cosines[block] / max(1, count)) for block, s in solutions.items()}


def _no_rows(job: FitJob, rollouts: Rollouts) -> Sums:
    """Empty sums, with features standardised on some of these rollouts."""
    seen: list[Rows] = []
    for rows in job.rows(rollouts):
        seen.append(rows)
        if sum(len(next(iter(part.values()))[0]) for part in seen) >= STANDARD_ROWS:
            break
    sums = {}
    for block, _ in job.setting.blocks:
        student, teacher = (torch.cat(states) for states in zip(*(part[block] for part in seen), strict=True))
        if len(teacher) < 2:
            raise DataError(
                f"of the tokens in the first {len(rollouts)} completions {len(teacher)} are aligned with the teacher's and "
                f"followed by one of probability {job.setting.confidence}; give longer completions"
            )
        features = Features.random(teacher, job.setting.features, seed=block)
        widths = student.shape[1], features(teacher[:1]).shape[1]
        fit, held_out = (Moments.zeros(*widths, student.device) for _ in range(2))
        sums[block] = features, fit, held_out
    return sums
