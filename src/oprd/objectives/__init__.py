"""Objectives, one file per method. A new one is registered here."""

from oprd.config import HiddenMSEConfig, ObjectiveConfig, OutputKLConfig, objective_terms
from oprd.objectives.base import Objective
from oprd.objectives.hidden import HiddenMSE
from oprd.objectives.kl import OutputKL

REGISTRY = {
    HiddenMSEConfig: HiddenMSE,
    OutputKLConfig: OutputKL,
}


def build_objectives(config: ObjectiveConfig, *, blocks: int, vocabulary: int) -> tuple[Objective, ...]:
    """The objectives whose weighted sum is minimised; a mixture has several. `blocks` and `vocabulary` are the student's.

    Raises ConfigError where the config does not fit a model of that size.
    """
    return tuple(REGISTRY[type(term)](term, blocks=blocks, vocabulary=vocabulary) for term in objective_terms(config))
