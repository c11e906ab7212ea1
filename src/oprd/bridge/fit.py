"""The fit: the student writes, both models read what it wrote, the sums grow. Only the gradient fit keeps rows.

The mean cosine is no function of second moments, so the held-out completions (their ids, at most HELD_OUT_COMPLETIONS of
them) are read once more after the solve.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from oprd.bridge.features import Features
from oprd.bridge.file import Measured, save_synced
from oprd.bridge.gradient import fit_by_gradient
from oprd.bridge.moments import Moments
from oprd.bridge.solve import Solution, cosine_sums, explained_variance, solve
from oprd.data.collate import collate_student, split_by_tokens
from oprd.errors import DataError
from oprd.kernels.chunked import confidence
from oprd.models import LanguageModel
from oprd.teacher.base import Teacher
from oprd.types import HiddenTargets, Prompt, Reading, Rollouts, States

STANDARD_ROWS = 2048
"""So many rows give mean and scale of the features."""
HELD_OUT_COMPLETIONS = 512
"""So many are read again for the cosine: some thousands of rows, more than it needs."""

Rows = tuple[Float[Tensor, "N S"], Float[Tensor, "N T"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What is read off the two models for one of the student's blocks."""

    block: int
    student: Reading
    teacher: Reading

    @property
    def name(self) -> str:
        return f"block {self.student.block} of the student and {self.teacher.block} of the teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """Student and teacher, to be read on the same rollouts."""

    lm: LanguageModel
    read: Callable[..., States]
    """`read_states` of the student with its model filled in."""
    teacher: Teacher
    pairs: tuple[Pair, ...]
    micro_batch_tokens: int
    confidence: float
    """Only rows at which the student gives its likeliest next token at least this probability."""

    @torch.no_grad()
    def rows(self, rollouts: Rollouts) -> Iterator[dict[int, Rows]]:
        """Micro-batch by micro-batch, the paired states [N, D] of every pair. `rollouts` come from `teacher.prepare`."""
        student = tuple(pair.student for pair in self.pairs)
        last = replace(student[0], block="last")
        asked = dict.fromkeys((*student, last) if self.confidence > 0 else student)
        teacher = tuple(dict.fromkeys(pair.teacher for pair in self.pairs))
        training = self.lm.model.training
        self.lm.model.eval()
        try:
            for micro in split_by_tokens(rollouts, self.micro_batch_tokens):
                targets = self.teacher.targets(micro, teacher, head=False)
                assert isinstance(targets, HiddenTargets)
                batch = collate_student(micro, pad_id=self.lm.pad_id, device=self.lm.device)
                states = self.read(batch, asked, head=self.confidence > 0)
                sure: slice | Tensor = slice(None)
                if states.head is not None:
                    sure = confidence(states.hidden[last], states.head) >= self.confidence
                yield {
                    pair.block: (states.hidden[pair.student][sure], targets.hidden[pair.teacher][sure])
                    for pair in self.pairs
                }
        finally:
            self.lm.model.train(training)

    def nothing_yet(self, widths: tuple[int, int], *, features: int, keep_rows: bool = False) -> "Sums":
        """The sums of every pair before any row; `widths` of student and teacher."""
        student, teacher = widths
        blocks, device = [pair.block for pair in self.pairs], self.lm.device
        fit, held_out = (
            {block: Moments.zeros(student, teacher + features, device=device) for block in blocks} for _ in range(2)
        )
        drawn = {block: Features.random(teacher, features, seed=block, device=device) for block in blocks}
        rows: dict[int, list[Rows]] = {block: [] for block in blocks} if keep_rows else {}
        return Sums(batches=0, features=drawn, fit=fit, held_out=held_out, again=[], rows=rows)

    def standardise(self, features: Mapping[int, Features], rollouts: Rollouts) -> None:
        """Bring the features to the scale of the teacher's states on some of these rollouts."""
        seen: dict[int, list[Tensor]] = {block: [] for block in features}
        for rows in self.rows(rollouts):
            for block, (_, teacher) in rows.items():
                seen[block].append(teacher)
            if min(sum(map(len, states)) for states in seen.values()) >= STANDARD_ROWS:
                break
        for block, states in seen.items():
            features[block].standardise(torch.cat(states))

    def add(self, sums: "Sums", rollouts: Rollouts, *, measuring: bool) -> None:
        """Count the rollouts' rows in."""
        moments = sums.held_out if measuring else sums.fit
        for rows in self.rows(rollouts):
            for block, (student, teacher) in rows.items():
                moments[block].add(student, sums.features[block](teacher))
                if sums.rows and not measuring:
                    sums.rows[block].append((student.float().cpu(), teacher.float().cpu()))


@dataclass(kw_only=True)
class Sums:
    """Where a fit is: what is stored when it is interrupted."""

    batches: int
    """So many batches of prompts are counted in."""
    features: dict[int, Features]
    """Of each pair's teacher; standardised by the first rows."""
    fit: dict[int, Moments]
    held_out: dict[int, Moments]
    again: list[tuple[int, tuple[int, ...], bool]]
    """Held-out completions to be read again: (index of the prompt, ids, finished)."""
    rows: dict[int, list[Rows]]
    """Those that are fitted to, for the gradient fit; empty without one."""

    def save(self, path: Path, key: str) -> None:
        """Write the record. `key` says which fit it is."""
        header = json.dumps({"key": key, "batches": self.batches, "again": self.again})
        rows = {
            f"rows.{block}.{side}": torch.cat(parts)
            for block, pairs in self.rows.items()
            if pairs
            for side, parts in zip(("student", "teacher"), zip(*pairs, strict=True), strict=True)
        }
        save_synced(dict(self._tensors()) | rows, path, {"fit": header})

    def load(self, path: Path, key: str) -> None:
        """Go on where `path` was written. Raises DataError when that was another fit."""
        with safe_open(path, framework="pt") as stored:
            header = json.loads(stored.metadata()["fit"])
            if header["key"] != key:
                raise DataError(
                    f"{path} is an interrupted fit of other models, prompts or settings; go on with its own recipe, or "
                    "delete it"
                )
            for name, tensor in self._tensors():
                tensor.copy_(stored.get_tensor(name))
            stored_rows = [name for name in stored.keys() if name.startswith("rows.")]  # noqa: SIM118  # no dict
            for block, kept in self.rows.items():
                sides = [stored.get_tensor(name) for name in sorted(stored_rows) if name.startswith(f"rows.{block}.")]
                kept += [(sides[0], sides[1])] if sides else []
        self.batches = header["batches"]
        self.again = [(index, tuple(ids), finished) for index, ids, finished in header["again"]]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for part, by_block in (("fit", self.fit), ("held_out", self.held_out), ("features", self.features)):
            for block, held in by_block.items():
                yield from ((f"{part}.{block}.{name}", tensor) for name, tensor in held.tensors())


def is_held_out(index: int, share: float) -> bool:
    """Whether the prompt at `index` only measures: spread evenly, whole prompts, so that no completion is on both sides."""
    return int((index + 1) * share) > int(index * share)


def accumulate(
    both: Both,
    sums: Sums,
    batches: Sequence[Sequence[int]],
    write: Callable[[int], Rollouts],
    *,
    held_out: float,
    after_batch: Callable[[Sums], Any],
) -> None:
    """Count in the batches of prompt indices that are not yet. `write` gives the completions of a batch by its number,
    each prompt's together and in order."""
    for number in range(sums.batches, len(batches)):
        rollouts = both.teacher.prepare(write(number))
        if number == 0:
            both.standardise(sums.features, rollouts)
        size = len(rollouts) // len(batches[number])
        asides = [is_held_out(batches[number][i // size], held_out) for i in range(len(rollouts))]
        for measuring in (False, True):
            some = [i for i, aside in enumerate(asides) if aside == measuring]
            if some:
                both.add(sums, rollouts.take(some), measuring=measuring)
        room = HELD_OUT_COMPLETIONS - len(sums.again)
        sums.again += [
            (batches[number][i // size], rollouts.completion_ids[i], rollouts.finished[i])
            for i, aside in enumerate(asides)
            if aside
        ][: max(0, room)]
        sums.batches = number + 1
        after_batch(sums)


def solve_all(both: Both, sums: Sums, *, max_rank: int) -> dict[int, Solution]:
    """The closed form for every pair."""
    return {
        pair.block: solve(
            sums.fit[pair.block],
            sums.held_out[pair.block],
            sums.features[pair.block],
            max_rank=max_rank,
            name=pair.name,
        )
        for pair in both.pairs
    }


def solve_by_gradient(both: Both, sums: Sums, *, max_rank: int, seed: int) -> dict[int, Solution]:
    """The authors' fit on the kept rows; the canonical directions are those of the closed form, which has no gradient fit."""
    closed = solve_all(both, sums, max_rank=max_rank)
    solutions = {}
    for pair in both.pairs:
        student, teacher = (torch.cat(side) for side in zip(*sums.rows[pair.block], strict=True))
        p_s, p_t, mean = fit_by_gradient(student, teacher, max_rank=max_rank, seed=seed)
        no_bias = torch.zeros(student.shape[1], dtype=torch.float64)
        measured = sums.held_out[pair.block].of_first(teacher.shape[1])
        solutions[pair.block] = Solution(
            student_projection=p_s,
            teacher_projection=p_t,
            student_mean=no_bias,
            teacher_mean=mean,
            directions=closed[pair.block].directions,
            canonical=closed[pair.block].canonical,
            explained=explained_variance(measured, p_s.double(), p_t.double(), no_bias, mean.double()),
        )
    return solutions


def measure_cosine(
    both: Both, sums: Sums, solutions: Mapping[int, Solution], prompts: Sequence[Prompt]
) -> dict[int, Measured]:
    """Mean cosine of u and v at every rank, on the held-out completions that were set aside."""
    rollouts = both.teacher.prepare(
        Rollouts(
            prompts=tuple(prompts[index] for index, _, _ in sums.again),
            completion_ids=tuple(ids for _, ids, _ in sums.again),
            finished=tuple(finished for _, _, finished in sums.again),
        )
    )
    totals = {pair.block: torch.zeros(len(solutions[pair.block].student_projection)).double() for pair in both.pairs}
    counts = dict.fromkeys(totals, 0)
    for rows in both.rows(rollouts):
        for block, (student, teacher) in rows.items():
            solution = solutions[block]
            u = (student.double() - solution.student_mean) @ solution.student_projection.double().T
            v = (teacher.to(u) - solution.teacher_mean) @ solution.teacher_projection.double().T
            totals[block] += cosine_sums(u, v).cpu()
            counts[block] += len(student)
    return {
        block: Measured(
            cosine=total / max(1, counts[block]),
            rows=int(sums.fit[block].count),
            held_out_rows=int(sums.held_out[block].count),
        )
        for block, total in totals.items()
    }
