# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
"""Objectives, one file per paper. A new one is registered here."""

from typing import Annotated

from oprd.objectives.nll import NLL
from oprd.objectives.omni_opd import OmniOPD
from oprd.objectives.opd import OPD, OPDSampled, OPDTopK
from oprd.objectives.oprd import OPRD
from oprd.objectives.oprd_bridge import OPRDBridge
from oprd.objectives.oprd_bridge_published import OPRDBridgePublished
from oprd.objectives.ride import RIDE
from oprd.section import Field

AnyObjective = Annotated[
    OPRD | RIDE | OPD | OPDTopK | OPDSampled | OPRDBridge | OPRDBridgePublished | OmniOPD | NLL,
    Field(discriminator="type"),
]
