"""oprd: on-policy distillation for people who ship models."""

from oprd.config.models import LocalTeacherConfig as LocalTeacher
from oprd.config.models import LoraConfig, StudentConfig
from oprd.config.models import RewritingTeacherConfig as RewritingTeacher
from oprd.config.models import SelfTeacherConfig as SelfTeacher
from oprd.config.models import SequenceTeacherConfig as SequenceTeacher
from oprd.config.models import ServerTeacherConfig as ServerTeacher
from oprd.config.models import SeveralTeachersConfig as SeveralTeachers
from oprd.config.objectives import BridgeConfig as Bridge
from oprd.config.objectives import BridgeFitConfig as BridgeFit
from oprd.config.objectives import HiddenMSEConfig as HiddenMSE
from oprd.config.objectives import MixtureConfig as Mixture
from oprd.config.objectives import OmniOPDConfig as OmniOPD
from oprd.config.objectives import OutputKLConfig as OutputKL
from oprd.config.objectives import RewrittenConfig as RewrittenNLL
from oprd.config.reading import load_recipe
from oprd.config.recipe import DataConfig, EvaluationConfig, Recipe, RolloutConfig
from oprd.config.recipe import EffOPDConfig as EffOPD
from oprd.config.recipe import StageConfig as Stage

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
