"""oprd: on-policy distillation for people who ship models."""

from oprd.config import BridgeConfig as Bridge
from oprd.config import BridgeFitConfig as BridgeFit
from oprd.config import (
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    Recipe,
    RolloutConfig,
    StudentConfig,
    load_recipe,
)
from oprd.config import EffOPDConfig as EffOPD
from oprd.config import HiddenMSEConfig as HiddenMSE
from oprd.config import LocalTeacherConfig as LocalTeacher
from oprd.config import MixtureConfig as Mixture
from oprd.config import OmniOPDConfig as OmniOPD
from oprd.config import OutputKLConfig as OutputKL
from oprd.config import RewritingTeacherConfig as RewritingTeacher
from oprd.config import RewrittenConfig as RewrittenNLL
from oprd.config import SelfTeacherConfig as SelfTeacher
from oprd.config import SequenceTeacherConfig as SequenceTeacher
from oprd.config import ServerTeacherConfig as ServerTeacher
from oprd.config import SeveralTeachersConfig as SeveralTeachers
from oprd.config import StageConfig as Stage

__all__ = [
    "Bridge",
    "BridgeFit",
    "DataConfig",
    "EffOPD",
    "EvaluationConfig",
    "HiddenMSE",
    "LocalTeacher",
    "LoraConfig",
    "Mixture",
    "OmniOPD",
    "OutputKL",
    "Recipe",
    "RewritingTeacher",
    "RewrittenNLL",
    "RolloutConfig",
    "SelfTeacher",
    "SequenceTeacher",
    "ServerTeacher",
    "SeveralTeachers",
    "Stage",
    "StudentConfig",
    "distill",
    "load_recipe",
]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import; a recipe can be read without them
    if name == "distill":
        from oprd.train.run import distill

        return distill
    raise AttributeError(f"module 'oprd' has no attribute {name!r}")
