"""oprd: on-policy distillation for people who ship models."""

from importlib.metadata import version
from typing import TYPE_CHECKING

__version__ = version("oprd")

if TYPE_CHECKING:
    from oprd.data.prompts import DataConfig
    from oprd.effopd import EffOPDConfig
    from oprd.evaluate.benchmarks import EvaluationConfig
    from oprd.models.loading import LoraSection, StudentConfig
    from oprd.objectives import NLL, OPD, OPRD, RIDE, OmniOPD, OPDSampled, OPDTopK, OPRDBridge, OPRDBridgePublished
    from oprd.recipe import Recipe, RolloutConfig, load_recipe
    from oprd.rollout.sources import DatasetSource, RewriteSource, StudentSource, TeacherSource
    from oprd.section import Ramp, WeightSchedule
    from oprd.teacher import LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig, SeveralTeachersConfig
    from oprd.train.pair import Given
    from oprd.train.run import distill

_WHERE = {
    "oprd.data.prompts": ("DataConfig",),
    "oprd.effopd": ("EffOPDConfig",),
    "oprd.evaluate.benchmarks": ("EvaluationConfig",),
    "oprd.models.loading": ("LoraSection", "StudentConfig"),
    "oprd.objectives": (
        "NLL", "OPD", "OPDSampled", "OPDTopK", "OPRD", "OPRDBridge", "OPRDBridgePublished", "OmniOPD", "RIDE",
    ),
    "oprd.recipe": ("Recipe", "RolloutConfig", "load_recipe"),
    "oprd.rollout.sources": ("DatasetSource", "RewriteSource", "StudentSource", "TeacherSource"),
    "oprd.section": ("Ramp", "WeightSchedule"),
    "oprd.teacher": ("LocalTeacherConfig", "SelfTeacherConfig", "ServerTeacherConfig", "SeveralTeachersConfig"),
    "oprd.train.run": ("distill",),
    "oprd.train.pair": ("Given",),
}  # fmt: skip
__all__ = [name for names in _WHERE.values() for name in names]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import; `oprd --help` does without them
    for module, names in _WHERE.items():
        if name in names:
            import importlib

            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'oprd' has no attribute {name!r}")
