"""What the loop asks of a teacher."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from oprd.types import Prompt, Reading, Rollouts, Tally, TeacherTargets


class Teacher(ABC):
    """Answers on rollouts. Never gets gradient."""

    def prepare(self, rollouts: Rollouts) -> Rollouts:
        """Called once a step with all rollouts of this process, before any targets: returns what will be learned on.

        Local teachers of the student's tokenizer return them as they are. Remote ones send all their requests here and
        attach the answers; one that rewrites returns other completions.
        """
        return rollouts

    def tallies(self) -> tuple[Tally, ...]:
        """What `prepare` has to report in the step's metrics, read once a step; the same names on every process at every
        step. Equal names are added up."""
        return ()

    def comparable(self, rollouts: Rollouts, readings: Iterable[Reading]) -> tuple[Reading, ...]:
        """Those of the student's `readings` that the teacher has too, meaning the same: health numbers compare these."""
        return ()

    @abstractmethod
    def targets(self, rollouts: Rollouts, readings: Iterable[Reading], *, head: bool) -> TeacherTargets:
        """The teacher's answer on these rollouts, one entry per supervised completion token.

        The teacher may read another prompt than the student; entries are paired by position in the completion.
        """

    def close(self) -> None:  # noqa: B027
        """Called once when training ends, however it ends: give back what was started."""

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:  # noqa: B027
        """Called once before training: raise DataError for a prompt this teacher cannot answer."""
