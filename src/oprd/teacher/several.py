"""Several teachers; each prompt names its own."""

from collections.abc import Iterable, Mapping
from typing import final

from oprd.errors import DataError
from oprd.teacher.base import Teacher
from oprd.types import Prompt, Reading, Rollouts, Tally, TeacherTargets, concatenate


@final
class SeveralTeachers(Teacher):
    """Passes each micro-batch to the teacher its prompts name; a micro-batch never mixes teachers (`split_by_tokens`)."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self._teachers = teachers

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        prompts = tuple(prompts)
        for prompt in prompts:
            if prompt.teacher not in self._teachers:
                raise DataError(
                    f"row {prompt.row}: column 'teacher' is {prompt.teacher!r}, allowed: {', '.join(self._teachers)}"
                )
        for name, teacher in self._teachers.items():
            teacher.check_prompts(p for p in prompts if p.teacher == name)

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        order: list[int] = []
        parts: list[Rollouts] = []
        for name, teacher in self._teachers.items():
            rows = [i for i, prompt in enumerate(rollouts.prompts) if prompt.teacher == name]
            order += rows
            parts.append(teacher.prepare(rollouts.take(rows)))
        together = concatenate(parts)
        return together.take([order.index(i) for i in range(len(order))])

    def tallies(self) -> tuple[Tally, ...]:
        return tuple(
            Tally(name=f"{tally.name.replace('teacher/', f'teacher_{name}/', 1)}", total=tally.total, of=tally.of)
            for name, teacher in self._teachers.items()
            for tally in teacher.tallies()
        )

    def comparable(self, rollouts: Rollouts, readings: Iterable[Reading]) -> tuple[Reading, ...]:
        return self._of(rollouts).comparable(rollouts, readings)

    def close(self) -> None:
        for teacher in self._teachers.values():
            teacher.close()

    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> TeacherTargets:
        return self._of(rollouts).targets(rollouts, readings, head=head)

    def _of(self, rollouts: Rollouts) -> Teacher:
        names = {prompt.teacher for prompt in rollouts.prompts}
        assert len(names) == 1, names
        return self._teachers[str(names.pop())]
