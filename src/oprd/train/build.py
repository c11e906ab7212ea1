"""From a recipe to a run that is ready to go: everything cheap is checked first, then the models are loaded."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from oprd.algorithm import DistillModel
from oprd.bridge.file import check_side, check_weights, tokenizer_fingerprint, weights_fingerprint
from oprd.config import (
    EffOPDConfig,
    LocalTeacherConfig,
    Recipe,
    RewritingTeacherConfig,
    SelfTeacherConfig,
    SequenceTeacherConfig,
    ServerTeacherConfig,
    SeveralTeachersConfig,
)
from oprd.data.align import Aligner
from oprd.data.chat import end_of_turn, stop_ids
from oprd.data.prompts import PromptSampler, load_prompts
from oprd.errors import ConfigError, DataError, TeacherMismatch
from oprd.evaluate.benchmarks import Benchmark, load_benchmarks
from oprd.models import (
    LanguageModel,
    Shape,
    check_same_shape,
    check_same_tokens,
    count_parameters,
    deepest_block,
    freeze_unused,
    frozen_copy,
    is_peft,
    load_student,
    load_teacher,
    load_tokenizer,
    read_shape,
)
from oprd.objectives import Objective, build_objectives, check_pair
from oprd.objectives.bridge import Bridge
from oprd.rollout.hf import HFEngine
from oprd.teacher.base import Teacher
from oprd.teacher.local import Likeness, LocalTeacher
from oprd.teacher.several import SeveralTeachers
from oprd.teacher.writer import LocalWriter, Writer
from oprd.train.checkpoint import find_checkpoint
from oprd.train.extrapolation import Extrapolation, validation_prompts
from oprd.train.run_folder import RunFolder
from oprd.train.stages import first_stage
from oprd.train.talking import (
    Served,
    audit,
    connect,
    has_other_terms,
    leaf,
    local_writer,
    members,
    omni_term,
    provided_by,
    refuse_sharded_self,
    served_tokenizer,
    served_top_k,
    wrap_writer,
)
from oprd.types import Prompt, Reading, States, TextTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects handed over from Python in place of names in the recipe."""

    student: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    prompts: datasets.Dataset | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is ready to go."""

    recipe: Recipe
    accelerator: Accelerator
    folder: RunFolder
    lm: LanguageModel
    stages: tuple[tuple[Objective, ...], ...]
    """The objectives of every stage."""
    stage: int
    """Which of them is under way."""
    trainable: tuple[nn.Parameter, ...]
    """What may get gradient in some stage."""
    model: nn.Module
    """DistillModel in its DDP or FSDP wrapper."""
    readings: tuple[Reading, ...]
    """Every hidden state of the student that some objective needs, once."""
    teacher_readings: tuple[Reading, ...]
    """The same of the teacher."""
    uses_head: bool
    teacher: Teacher
    engine: HFEngine
    prompts: tuple[Prompt, ...]
    sampler: PromptSampler
    benchmarks: tuple[Benchmark, ...]
    stop_ids: tuple[int, ...]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    read: Callable[..., Any]
    """DistillModel.read, through the wrapper where weights are sharded."""
    extrapolation: Extrapolation | None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Those of the stage under way."""
        return self.stages[self.stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the cheap checks have read."""

    tokenizer: PreTrainedTokenizerBase
    shape: Shape
    prompts: tuple[Prompt, ...]
    benchmarks: tuple[Benchmark, ...]
    stages: tuple[tuple[Objective, ...], ...]
    teacher_tokenizers: dict[str, PreTrainedTokenizerBase]
    likeness: dict[str, Likeness]
    """Of every teacher by its name."""


def check(recipe: Recipe, given: Given, *, world_size: int = 1) -> Checked:
    """Everything that can be known before weights are loaded. Raises an OprdError for the first thing that is wrong."""
    folder = RunFolder(recipe.output_dir)
    student = given.student if given.student is not None else recipe.student.model
    shape = read_shape(student, recipe.student.gguf_file)
    folder.check(recipe, needed_gib=_disk_gib(recipe, student))
    if recipe.resume_from_checkpoint is not None:
        find_checkpoint(folder.checkpoints, recipe.resume_from_checkpoint)
    if recipe.prompts_per_step % world_size:
        raise ConfigError(
            f"prompts_per_step is {recipe.prompts_per_step}, the processes are {world_size}; make it a multiple"
        )
    if recipe.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError("bf16 is true, but this GPU does not support bfloat16; set bf16=false")
    stages = tuple(
        build_objectives(stage.objective, blocks=shape.blocks, vocabulary=shape.vocabulary)
        for stage in recipe.schedule()
    )
    objectives = tuple(objective for stage in stages for objective in stage)
    tokenizer = given.tokenizer or load_tokenizer(recipe.student.model, recipe.student.gguf_file)
    for member in members(recipe.teacher).values():
        check_pair(objectives, provided_by(member), member.type)
    tokenizers, likeness = check_teachers(
        recipe,
        given,
        shape,
        tokenizer,
        across_shapes=all(objective.across_shapes for objective in objectives),
        across_tokenizers=all(objective.across_tokenizers for objective in objectives),
        uses_head=any(objective.uses_head for objective in objectives),
    )
    for objective in objectives:
        if isinstance(objective, Bridge):
            _check_bridge(objective, recipe, given, shape, tokenizer, tokenizers)
    room = recipe.rollout.max_completion_length
    prompts = load_prompts(recipe.data, tokenizer, context=shape.context, room=room, given=given.prompts)
    if recipe.rollout.lambda_on_policy < 1:
        bare = next((prompt for prompt in prompts if not prompt.completion), None)
        if bare is not None:
            raise DataError(
                f"rollout.lambda_on_policy is {recipe.rollout.lambda_on_policy}, but row {bare.row} of "
                f"{recipe.data.prompts} has no column 'completion'"
            )
    omni = omni_term(recipe)
    if omni is not None and has_other_terms(recipe) and not all(alike.tokens for alike in likeness.values()):
        raise TeacherMismatch(
            "objective 'omni_opd' in a mixture needs a teacher with the student's tokenizer; alone it needs text only"
        )
    if omni is not None and omni.embedding_model is not None:
        read_shape(omni.embedding_model)
    _check_validation(recipe, prompts)
    benchmarks = load_benchmarks(recipe.evaluation, tokenizer, context=shape.context)
    return Checked(
        tokenizer=tokenizer,
        shape=shape,
        prompts=prompts,
        benchmarks=benchmarks,
        stages=stages,
        teacher_tokenizers=tokenizers,
        likeness=likeness,
    )


def build(recipe: Recipe, given: Given | None = None) -> Run:
    """Check, load, wrap."""
    given = given or Given()
    # accelerate keeps its first precision for the whole process; a second run in one process has its own recipe
    AcceleratorState._reset_state()
    # the recipe says it all: a launcher's mixed precision setting is not looked at
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.bf16 else "no",
        log_with=list(recipe.report_to) or None,
        project_dir=recipe.output_dir,
    )
    _refuse_separate_processes(accelerator)
    checked = check(recipe, given, world_size=accelerator.num_processes)
    accelerator.wait_for_everyone()
    folder = RunFolder(recipe.output_dir)
    served = connect(recipe, checked.teacher_tokenizers, checked.prompts, accelerator)

    student = load_student(recipe.student, given.student)
    lm = LanguageModel(model=student, tokenizer=checked.tokenizer, name=recipe.student.model)
    for bridge in _bridges(checked.stages):
        check_weights(bridge.config.bridge, "student", bridge.file.student, weights_fingerprint(lm))
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and recipe.stages:
        raise ConfigError(
            "stages wrap the student anew for each objective, which FSDP cannot undo; run the second stage from the first "
            "one's student, or use DDP"
        )
    if sharded and any(bridge.config.refit_every is not None for bridge in _bridges(checked.stages)):
        raise ConfigError(
            "refit_every reads another number of micro-batches on each process, which FSDP waits for forever"
        )
    frozen = None
    omni = omni_term(recipe)
    own = any(isinstance(leaf(member), SelfTeacherConfig) for member in members(recipe.teacher).values())
    if not is_peft(student) and (own or (omni is not None and omni.anchor > 0)):
        frozen = frozen_copy(student).to(accelerator.device)
    trainable = tuple(parameter for parameter in student.parameters() if parameter.requires_grad)
    stage = first_stage(recipe)
    prepared = _prepare(recipe, accelerator, lm, trainable, checked.stages[stage], stage)
    inner = prepared.inner

    def read(batch: Any, readings: Any, head: bool, then: Callable[[States], Any] = lambda states: states) -> Any:
        with accelerator.autocast():
            return inner.read(batch, readings, head, then)

    stops = stop_ids(checked.tokenizer, lm.core.generation_config)
    site = _Site(
        recipe=recipe, given=given, checked=checked, lm=lm, frozen=frozen, accelerator=accelerator, read=read,
        generate=inner.generate, stops=stops, served=served,
    )  # fmt: skip
    teacher = _build_teachers(site)
    teacher.check_prompts(checked.prompts)
    for bridge in _bridges(checked.stages):
        assert isinstance(teacher, LocalTeacher)
        check_weights(bridge.config.bridge, "teacher", bridge.file.teacher, weights_fingerprint(teacher.lm))
    engine = HFEngine(
        lm,
        stops,
        max_sequences=recipe.rollout.max_sequences,
        generate=inner.generate,
        autocast=lambda: accelerator.autocast(),
        same_steps=sharded,
    )
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        folder=folder,
        lm=lm,
        stages=checked.stages,
        stage=stage,
        trainable=trainable,
        model=prepared.model,
        readings=inner.readings,
        teacher_readings=inner.teacher_readings,
        uses_head=inner.uses_head,
        teacher=teacher,
        engine=engine,
        prompts=checked.prompts,
        sampler=PromptSampler(
            checked.prompts,
            per_step=recipe.prompts_per_step,
            seed=recipe.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ),
        benchmarks=checked.benchmarks,
        stop_ids=stops,
        optimizer=prepared.optimizer,
        scheduler=prepared.scheduler,
        extrapolation=prepared.extrapolation,
        read=read,
    )


def enter_stage(run: Run, stage: int) -> Run:
    """The same student, teacher and prompts with the stage's objectives, a fresh optimizer and a fresh schedule."""
    run.accelerator.free_memory()  # a wrapper that is still known would go on reducing the same gradients
    prepared = _prepare(run.recipe, run.accelerator, run.lm, run.trainable, run.stages[stage], stage)
    return replace(
        run,
        stage=stage,
        model=prepared.model,
        readings=prepared.inner.readings,
        teacher_readings=prepared.inner.teacher_readings,
        uses_head=prepared.inner.uses_head,
        optimizer=prepared.optimizer,
        scheduler=prepared.scheduler,
        extrapolation=prepared.extrapolation,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What depends on the objectives."""

    inner: DistillModel
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    extrapolation: Extrapolation | None


def _prepare(
    recipe: Recipe,
    accelerator: Accelerator,
    lm: LanguageModel,
    trainable: tuple[nn.Parameter, ...],
    objectives: tuple[Objective, ...],
    stage: int,
) -> _Prepared:
    config = recipe.schedule()[stage]
    updates = config.max_steps * recipe.rollout.updates_per_rollout
    for parameter in trainable:
        parameter.requires_grad_(True)
    distill = DistillModel(lm, objectives)
    freeze_unused(lm, deepest_block(lm, distill.readings), head=distill.uses_head)
    optimizer = _optimizer(recipe, distill, config.learning_rate or recipe.learning_rate)
    model, prepared = accelerator.prepare(distill, optimizer)
    assert isinstance(prepared.optimizer, torch.optim.Optimizer)
    if isinstance(model, FSDPModule):
        for method in ("read", "generate"):
            register_fsdp_forward_method(cast(nn.Module, model), method)
    return _Prepared(
        inner=cast(DistillModel, accelerator.unwrap_model(model, keep_torch_compile=False)),
        model=cast(nn.Module, model),
        optimizer=prepared.optimizer,
        scheduler=get_scheduler(
            recipe.lr_scheduler_type,
            prepared.optimizer,
            num_warmup_steps=math.ceil(recipe.warmup_ratio * updates),
            num_training_steps=updates,
        ),
        extrapolation=None if recipe.extrapolation is None else _extrapolation(recipe.extrapolation, lm, accelerator),
    )


def _extrapolation(config: EffOPDConfig, lm: LanguageModel, accelerator: Accelerator) -> Extrapolation:
    def of_all(values: Sequence[float]) -> torch.Tensor:
        mine = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
        return cast(torch.Tensor, accelerator.gather(mine)).cpu()

    sharded = accelerator.distributed_type == DistributedType.FSDP
    return Extrapolation(
        config,
        lm,
        add_shards=(lambda values: of_all(values).sum(0).tolist()) if sharded else list,
        everywhere=lambda value: of_all([value])[:, 0].tolist(),
    )


def _check_validation(recipe: Recipe, prompts: tuple[Prompt, ...]) -> None:
    """The prompts on which extrapolation compares weights must be there, with answers if these are needed."""
    config = recipe.extrapolation
    if config is None:
        return
    if config.validation_prompts > len(prompts):
        raise ConfigError(
            f"extrapolation.validation_prompts is {config.validation_prompts}, the dataset has {len(prompts)} prompts; "
            "lower it"
        )
    talks = any(
        member is not leaf(member) or isinstance(member, ServerTeacherConfig)
        for member in members(recipe.teacher).values()
    )
    if config.score == "objective" and (talks or omni_term(recipe) is not None):
        raise ConfigError(
            "extrapolation.score 'objective' would ask a teacher that talks again for every candidate, and its losses do not "
            "compare weights; set extrapolation.score=accuracy"
        )
    chosen = validation_prompts(config, prompts, recipe.seed)
    bare = next((prompt for prompt in chosen if prompt.answer is None), None)
    if config.score == "accuracy" and bare is not None:
        raise DataError(
            f"extrapolation.score is 'accuracy', but row {bare.row} of {recipe.data.prompts} has no column 'answer'; "
            "set extrapolation.score=objective, or add the answers"
        )


def _refuse_separate_processes(accelerator: Accelerator) -> None:
    """Processes that accelerate does not see would train alone, each writing the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but each would train alone (accelerate sees "
            f"{accelerator.num_processes}); on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )


def _optimizer(recipe: Recipe, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
    )


def check_teachers(
    recipe: Recipe,
    given: Given,
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    *,
    across_shapes: bool,
    across_tokenizers: bool,
    uses_head: bool,
) -> tuple[dict[str, PreTrainedTokenizerBase], dict[str, Likeness]]:
    """Tokenizer of every teacher by its name and what it shares with the student, after checking that it is enough."""
    several = isinstance(recipe.teacher, SeveralTeachersConfig)
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    likeness: dict[str, Likeness] = {}
    for name, one in members(recipe.teacher).items():
        member = leaf(one)
        if isinstance(member, SelfTeacherConfig):
            tokenizers[name], likeness[name] = tokenizer, Likeness(shape=True, tokens=True)
            continue
        if isinstance(member, ServerTeacherConfig):
            theirs = served_tokenizer(member, name, scores=served_top_k(recipe) is not None and one is member)
            if theirs is not None:
                tokenizers[name] = theirs
            if served_top_k(recipe) is not None and theirs is not None:
                check_same_tokens(tokenizer, theirs, str(member.tokenizer))
            continue
        model = given.teacher if given.teacher is not None and not several else member.model
        # different vocabularies first: that is the reason a user has to hear when both differ
        own = given.teacher_tokenizer or (tokenizer if given.teacher is not None else None)
        tokenizers[name] = own or load_tokenizer(member.model, member.gguf_file)
        same_tokens = True
        try:
            check_same_tokens(tokenizer, tokenizers[name], member.model)
        except TeacherMismatch:
            if not across_tokenizers:
                raise
            same_tokens = False
            if uses_head and recipe.rollout.updates_per_rollout > 1:
                raise ConfigError(
                    f"rollout.updates_per_rollout is {recipe.rollout.updates_per_rollout}, but teacher {member.model} has "
                    "another tokenizer: importance weights are taken by token, not by the span between two pairs. Set it to 1"
                ) from None
        theirs = read_shape(model, member.gguf_file)
        if not across_shapes:
            check_same_shape(shape, theirs, member.model)
        same_shape = (shape.blocks, shape.width) == (theirs.blocks, theirs.width)
        likeness[name] = Likeness(shape=same_shape, tokens=same_tokens)
        if not same_tokens and member.alignment == "shared_ids":
            _check_shared_ids(tokenizer, theirs, member.model, uses_head=uses_head)
        elif not same_tokens:
            _aligner(tokenizer, tokenizers[name], None, member.model)
    if several and not all(one.tokens for one in likeness.values()):
        other = next(name for name, one in likeness.items() if not one.tokens)
        raise TeacherMismatch(
            f"teacher {other!r} of several has another tokenizer than the student; pairing tokens works with one teacher"
        )
    return tokenizers, likeness


def _check_shared_ids(tokenizer: PreTrainedTokenizerBase, teacher: Shape, name: str, *, uses_head: bool) -> None:
    """Raise TeacherMismatch where the student's ids cannot even be looked up, or would be given probabilities."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= teacher.vocabulary:
        raise TeacherMismatch(
            f"alignment 'shared_ids' feeds teacher {name} the student's ids, which go up to {largest}; its vocabulary has "
            f"{teacher.vocabulary} rows. Use alignment 'bytes'"
        )
    if uses_head:
        raise TeacherMismatch(
            f"alignment 'shared_ids': teacher {name} gives probabilities to tokens of its own vocabulary, which mean "
            "nothing for the student's. Use alignment 'bytes'"
        )


def _aligner(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    generation: Any,
    name: str,
    student_generation: Any = None,
) -> Aligner:
    return Aligner(
        student,
        teacher,
        student_stops=stop_ids(student, student_generation),
        teacher_end=end_of_turn(teacher, stop_ids(teacher, generation)),
        teacher_name=name,
    )


def _bridges(stages: tuple[tuple[Objective, ...], ...]) -> list[Bridge]:
    return [objective for stage in stages for objective in stage if isinstance(objective, Bridge)]


def _check_bridge(
    bridge: Bridge,
    recipe: Recipe,
    given: Given,
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    """Raise TeacherMismatch unless the bridge's file was fitted for these two models, as far as configs tell."""
    path, config = bridge.config.bridge, recipe.teacher
    if not isinstance(config, LocalTeacherConfig):
        raise TeacherMismatch("objective 'oprd_bridge' was fitted for one local teacher; use `teacher: {type: local}`")
    stored = bridge.file.setting.alignment
    if stored != config.alignment:
        raise TeacherMismatch(
            f"{path} was fitted with alignment {stored!r}, the recipe has {config.alignment!r}. Fit again, or set it back"
        )
    theirs = read_shape(given.teacher or config.model, config.gguf_file)
    ours_print, theirs_print = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(teacher_tokenizers[""])
    sides = (
        ("student", bridge.file.student, shape, ours_print),
        ("teacher", bridge.file.teacher, theirs, theirs_print),
    )
    for which, side, found, fingerprint in sides:
        check_side(path, which, side, width=found.width, blocks=found.blocks, tokenizer=fingerprint)


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
        aligner = _aligner(
            checked.tokenizer, own.tokenizer, generation, config.model, student_generation=lm.core.generation_config
        )
    return LocalTeacher(
        own,
        context=read_shape(model).context,
        system_prompt=config.system_prompt,
        prompt_template=config.prompt_template,
        likeness=likeness,
        aligner=aligner,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
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


def _build_teachers(site: _Site) -> Teacher:
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
    site: _Site, config: LocalTeacherConfig | SelfTeacherConfig, name: str, *, writes: bool
) -> tuple[LocalTeacher, LocalWriter | None]:
    """A model in this process as one that shows its states, and as one that writes."""
    several = isinstance(site.recipe.teacher, SeveralTeachersConfig)
    given = Given() if several else site.given
    uses_head = any(objective.uses_head for stage in site.checked.stages for objective in stage)
    reads_head = uses_head or site.recipe.health_tokens > 0 or writes
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


def _disk_gib(recipe: Recipe, student: str | PreTrainedModel) -> float:
    """Checkpoints hold weights, two moments and the snapshots of extrapolation of what is trained, in float32; the student
    is written once more."""
    parameters = count_parameters(student, recipe.student.gguf_file)
    config = recipe.extrapolation
    copies = 3 + (0 if config is None else 2 if config.triggers == "settled" else 1)
    if recipe.student.lora is not None:
        return 0.02 + parameters * 0.05 * 4 * copies * (recipe.save_total_limit + 1) / 2**30
    return (parameters * 4 * copies * (recipe.save_total_limit + 1) + parameters * 4) / 2**30
