"""From a recipe to the teacher that answers: models in this process, and what is made of the ones that talk."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from oprd.config.models import (
    LocalTeacherConfig,
    RewritingTeacherConfig,
    SelfTeacherConfig,
    SequenceTeacherConfig,
    ServerTeacherConfig,
    SeveralTeachersConfig,
)
from oprd.config.recipe import Recipe
from oprd.models import (
    LanguageModel,
    load_teacher,
    read_shape,
)
from oprd.teacher.base import Teacher
from oprd.teacher.local import LocalTeacher
from oprd.teacher.several import SeveralTeachers
from oprd.teacher.writer import LocalWriter, Writer
from oprd.train.check import Checked, Given, aligner_between, needs_start
from oprd.train.talking import (
    Served,
    audit,
    leaf,
    local_writer,
    members,
    omni_term,
    refuse_sharded_self,
    wrap_writer,
)
from oprd.types import TextTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the teachers of a run are built from."""

    recipe: Recipe
    given: Given
    checked: Checked
    lm: LanguageModel
    frozen: PreTrainedModel | None
    """The student at start, apart, where a teacher or the anchor is made of it and no adapter can be switched off."""
    accelerator: Accelerator
    read: Callable[..., Any]
    generate: Callable[..., Any]
    stops: tuple[int, ...]
    served: Mapping[str, Served]


def build_teacher(
    config: LocalTeacherConfig | SelfTeacherConfig,
    given: Given,
    checked: Checked,
    lm: LanguageModel,
    frozen: PreTrainedModel | None,
    accelerator: Accelerator,
    read: Callable[..., Any],
    reads_head: bool,
    name: str = "",
) -> LocalTeacher:
    if isinstance(config, SelfTeacherConfig):
        return _at_start(checked, lm, frozen, read, config.system_prompt, config.prompt_template)
    model = load_teacher(config, accelerator.device, given.teacher, head=reads_head)
    own = LanguageModel(model=model, tokenizer=checked.teacher_tokenizers[name], name=config.model)
    likeness = checked.likeness[name]
    aligner = None
    if not likeness.tokens and config.alignment == "bytes":
        generation = own.core.generation_config
        aligner = aligner_between(
            checked.tokenizer, own.tokenizer, generation, config.model, student_generation=lm.core.generation_config
        )
    return LocalTeacher(
        own,
        context=read_shape(model).context,
        system_prompt=config.system_prompt,
        prompt_template=config.prompt_template,
        likeness=likeness,
        aligner=aligner,
        start=_at_start(checked, lm, frozen, read) if needs_start(checked.stages) else None,
    )


def _at_start(
    checked: Checked,
    lm: LanguageModel,
    frozen: PreTrainedModel | None,
    read: Callable[..., Any],
    system_prompt: str | None = None,
    prompt_template: str | None = None,
) -> LocalTeacher:
    """The student before training: its adapter off, or the frozen copy."""
    own = lm if frozen is None else LanguageModel(model=frozen, tokenizer=checked.tokenizer, name=f"{lm.name} at start")
    off: Callable[[], contextlib.AbstractContextManager[Any]] = (
        lm.model.disable_adapter if frozen is None else contextlib.nullcontext  # type: ignore[assignment]
    )
    return LocalTeacher(
        own,
        context=checked.shape.context,
        system_prompt=system_prompt,
        prompt_template=prompt_template,
        read=read if frozen is None else None,
        without_adapter=off,
    )


def build_teachers(site: Site) -> Teacher:
    """Every teacher that answers, and around them what makes use of their text."""
    recipe = site.recipe
    omni = omni_term(recipe)
    several = isinstance(recipe.teacher, SeveralTeachersConfig)
    objectives = [objective for stage in site.checked.stages for objective in stage]
    by_text = all(objective.needs is TextTargets for objective in objectives)
    teachers: dict[str, Teacher] = {}
    writers: dict[str, Writer] = {}
    for name, member in members(recipe.teacher).items():
        config = leaf(member)
        if isinstance(config, ServerTeacherConfig):
            local, shown, writer = None, site.served[name].scorer, site.served[name].writer
        else:
            local, writer = _build_local(site, config, name, writes=omni is not None or member is not config)
            shown = local
        if isinstance(member, RewritingTeacherConfig | SequenceTeacherConfig):
            assert writer is not None
            shown = wrap_writer(recipe, member, writer, None if by_text else local, site.checked.tokenizer, site.stops)
        elif omni is not None:
            assert writer is not None
            writers[name] = writer
        if shown is not None:
            teachers[name] = shown
    # where a server only writes, nothing but its text answers for the prompts of that teacher
    whole = len(teachers) == len(members(recipe.teacher))
    under = (SeveralTeachers(teachers) if several else teachers[""]) if whole else None
    if omni is None:
        assert under is not None
        return under
    start = _at_start(site.checked, site.lm, site.frozen, site.read) if omni.anchor > 0 else None
    return audit(
        recipe, omni, writers,
        lm=site.lm, read=site.read, start=start, under=under, accelerator=site.accelerator,
    )  # fmt: skip


def _build_local(
    site: Site, config: LocalTeacherConfig | SelfTeacherConfig, name: str, *, writes: bool
) -> tuple[LocalTeacher, LocalWriter | None]:
    """A model in this process as one that shows its states, and as one that writes."""
    several = isinstance(site.recipe.teacher, SeveralTeachersConfig)
    given = Given() if several else site.given
    asked = any(objective.teacher_head for stage in site.checked.stages for objective in stage)
    reads_head = asked or site.recipe.health_tokens > 0 or writes
    teacher = build_teacher(
        config, given, site.checked, site.lm, site.frozen, site.accelerator, site.read, reads_head, name
    )
    if not writes:
        return teacher, None
    if isinstance(config, SelfTeacherConfig) and site.frozen is None:
        refuse_sharded_self(site.accelerator)
        return teacher, local_writer(
            site.recipe, site.lm, config, site.checked.shape.context,
            generate=site.generate, without_adapter=site.lm.model.disable_adapter,  # type: ignore[arg-type]
        )  # fmt: skip
    return teacher, local_writer(site.recipe, teacher.lm, config, read_shape(teacher.lm.core).context)
