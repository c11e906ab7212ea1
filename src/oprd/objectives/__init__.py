"""Objectives, one file per method. A new one is registered here."""

from typing import get_args

from oprd.config.objectives import (
    BridgeConfig,
    HiddenMSEConfig,
    ObjectiveConfig,
    OmniOPDConfig,
    OutputKLConfig,
    RewrittenConfig,
    objective_terms,
)
from oprd.errors import TeacherMismatch
from oprd.objectives.base import Objective
from oprd.objectives.bridge import Bridge
from oprd.objectives.hidden import HiddenMSE
from oprd.objectives.kl import OutputKL
from oprd.objectives.omni import OmniOPD
from oprd.objectives.rewritten import RewrittenNLL
from oprd.types import ChunkTargets, TextTargets

REGISTRY = {
    HiddenMSEConfig: HiddenMSE,
    OutputKLConfig: OutputKL,
    BridgeConfig: Bridge,
    OmniOPDConfig: OmniOPD,
    RewrittenConfig: RewrittenNLL,
}


def check_pair(objectives: tuple[Objective, ...], provides: frozenset[type], teacher: str) -> None:
    """Raise TeacherMismatch unless the teacher provides what every objective needs. `teacher` is its type in the recipe."""
    for objective in objectives:
        usable = get_args(objective.needs) or (objective.needs,)
        if provides.isdisjoint(usable):
            raise TeacherMismatch(
                f"objective {objective.name!r} needs {' or '.join(kind.__name__ for kind in usable)}; teacher "
                f"{teacher!r} provides {', '.join(sorted(kind.__name__ for kind in provides)) or 'nothing for it'}. "
                + _advice(usable)
            )


def _advice(usable: tuple[type, ...]) -> str:
    if TextTargets in usable:
        return "Use a teacher of type 'rewrite' or 'sequence'"
    if ChunkTargets in usable:
        return "Use a teacher of type 'local', 'self' or 'server'"
    return "Use a local teacher, or, with a server, objective 'omni_opd' or 'opd' with estimator 'sampled', or 'top_k' and support 'teacher'"


def build_objectives(config: ObjectiveConfig, *, blocks: int, vocabulary: int) -> tuple[Objective, ...]:
    """The objectives whose weighted sum is minimised; a mixture has several. `blocks` and `vocabulary` are the student's.

    Raises ConfigError where the config does not fit a model of that size.
    """
    return tuple(REGISTRY[type(term)](term, blocks=blocks, vocabulary=vocabulary) for term in objective_terms(config))
