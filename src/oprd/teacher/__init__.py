"""Teachers: who judges what the student wrote. A new one is registered here."""

from typing import Annotated

from oprd.section import Field
from oprd.teacher.local import LocalTeacherConfig, SelfTeacherConfig
from oprd.teacher.remote import RemoteTeacherConfig
from oprd.teacher.server import ServerTeacherConfig
from oprd.teacher.several import SeveralTeachersConfig

AnyTeacher = Annotated[
    LocalTeacherConfig | SelfTeacherConfig | ServerTeacherConfig | RemoteTeacherConfig | SeveralTeachersConfig,
    Field(discriminator="type"),
]
