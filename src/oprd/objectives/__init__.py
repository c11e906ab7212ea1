"""Objectives, one file per method. A new one is registered here."""

from oprd.config import BridgeConfig, HiddenMSEConfig, ObjectiveConfig, OutputKLConfig, objective_terms
from oprd.errors import TeacherMismatch
from oprd.objectives.base import Objective
from oprd.objectives.bridge import Bridge
from oprd.objectives.hidden import HiddenMSE
from oprd.objectives.kl import OutputKL
from oprd.teacher.base import Teacher

REGISTRY = {
    HiddenMSEConfig: HiddenMSE,
    OutputKLConfig: OutputKL,
    BridgeConfig: Bridge,
}


def check_pair(objectives: tuple[Objective, ...], teacher: type[Teacher]) -> None:
    """Raise TeacherMismatch unless the teacher provides what every objective needs."""
    for objective in objectives:
        if objective.needs not in teacher.provides:
            provided = ", ".join(sorted(kind.__name__ for kind in teacher.provides))
            raise TeacherMismatch(
                f"objective {objective.name!r} needs {objective.needs.__name__}; {teacher.__name__} provides {provided}. "
                "Use a local teacher"
            )


def build_objectives(config: ObjectiveConfig, *, blocks: int, vocabulary: int) -> tuple[Objective, ...]:
    """The objectives whose weighted sum is minimised; a mixture has several. `blocks` and `vocabulary` are the student's.

    Raises ConfigError where the config does not fit a model of that size.
    """
    return tuple(REGISTRY[type(term)](term, blocks=blocks, vocabulary=vocabulary) for term in objective_terms(config))
