"""Several teachers; each prompt names its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, final

from oprd.data.batching import concatenate
from oprd.errors import DataError, TeacherMismatch
from oprd.section import Field
from oprd.teacher.base import AnyTeacherConfig, Chains, Generation, Generations, Teacher, TeacherContext, TeacherFacts
from oprd.teacher.local import LocalTeacherConfig, SelfTeacherConfig
from oprd.teacher.remote import RemoteTeacherConfig
from oprd.teacher.server import ServerTeacherConfig
from oprd.types import Capability, HiddenSpec, Metric, Prompt, Rollouts, Taps, Targets

OneTeacherConfig = Annotated[
    LocalTeacherConfig | SelfTeacherConfig | ServerTeacherConfig | RemoteTeacherConfig, Field(discriminator="type")
]


@final
@dataclass(frozen=True, slots=True, eq=False)
class SeveralTeachers(Teacher):
    """Hands every prompt's share to its teacher; a micro-batch never mixes teachers (`split_by_tokens`)."""

    teachers: Mapping[str, Teacher]

    def annotate(self, rollouts: Rollouts) -> Rollouts:
        names = [str(prompt.teacher) for prompt in rollouts.prompts]
        rows = {name: [i for i, own in enumerate(names) if own == name] for name in self.teachers}
        parts = [teacher.annotate(rollouts.take(rows[name])) for name, teacher in self.teachers.items()]
        order = [i for own in rows.values() for i in own]
        return concatenate(parts).take([order.index(i) for i in range(len(order))])

    def targets(self, rollouts: Rollouts, taps: Taps) -> Targets:
        return self._of(rollouts).targets(rollouts, taps)

    def generate(self, chains: Chains) -> Generations:
        answers: dict[int, list[Generation | None]] = {}
        for name, teacher in self.teachers.items():
            rows = [i for i, chain in enumerate(chains) if chain and chain[0].teacher == name]
            answers |= zip(rows, teacher.generate([chains[i] for i in rows]), strict=True)
        return [answers.get(i, []) for i in range(len(chains))]

    def comparable(self, rollouts: Rollouts, specs: Sequence[HiddenSpec]) -> tuple[HiddenSpec, ...]:
        return self._of(rollouts).comparable(rollouts, specs)

    def metrics(self) -> tuple[Metric, ...]:
        return tuple(
            replace(metric, name=metric.name.replace("teacher/", f"teacher_{name}/", 1))
            for name, teacher in self.teachers.items()
            for metric in teacher.metrics()
        )

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()

    def _of(self, rollouts: Rollouts) -> Teacher:
        names = {prompt.teacher for prompt in rollouts.prompts}
        assert len(names) == 1, names
        return self.teachers[str(names.pop())]


class SeveralTeachersConfig(AnyTeacherConfig):
    """Several teachers; the dataset's `teacher` column names one for each prompt."""

    type: Literal["several"] = "several"
    teachers: Annotated[dict[str, OneTeacherConfig], Field(min_length=1)]
    """`name: {type: ...}`, at least one."""

    @property
    def members(self) -> Mapping[str, AnyTeacherConfig]:
        return self.teachers

    def facts(self, context: TeacherContext) -> TeacherFacts:
        """What every teacher provides. Raises TeacherMismatch where one in this process has another tokenizer."""
        members = {name: config.facts(context) for name, config in self.teachers.items()}
        for name, facts in members.items():
            if Capability.HIDDEN in facts.provides and Capability.SAME_TOKENIZER not in facts.provides:
                has = "has another tokenizer than the student; aligning tokens works with one teacher"
                raise TeacherMismatch(f"teacher {name!r} of several {has}")
        shared = frozenset.intersection(*(facts.provides for facts in members.values()))
        why_not = {capability: why for facts in members.values() for capability, why in facts.why_not.items()}
        return TeacherFacts(provides=shared - {Capability.ONE_MODEL}, why_not=why_not, model=None, members=members)

    def render(self, prompts: Sequence[Prompt], facts: TeacherFacts, room: int) -> list[Prompt]:
        for prompt in prompts:
            if prompt.teacher not in self.teachers:
                allowed = ", ".join(self.teachers)
                raise DataError(f"row {prompt.row}: column 'teacher' is {prompt.teacher!r}, allowed: {allowed}")
        own = {name: [p for p in prompts if p.teacher == name] for name in self.teachers}
        seen = {name: iter(self.teachers[name].render(some, facts.members[name], room)) for name, some in own.items()}
        return [next(seen[str(prompt.teacher)]) for prompt in prompts]

    def build(self, facts: TeacherFacts, context: TeacherContext, name: str = "") -> Teacher:
        built = {key: config.build(facts.members[key], context, key) for key, config in self.teachers.items()}
        return SeveralTeachers(built)
