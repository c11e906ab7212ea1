"""Everything about a recipe that is wrong and can be known before weights are loaded."""

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.bridge.file import check_side, tokenizer_fingerprint
from oprd.config.models import LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig, SeveralTeachersConfig
from oprd.config.recipe import Recipe
from oprd.data.align import Aligner
from oprd.data.chat import end_of_turn, stop_ids
from oprd.data.prompts import load_prompts
from oprd.errors import ConfigError, DataError, TeacherMismatch
from oprd.evaluate.benchmarks import Benchmark, load_benchmarks
from oprd.models import (
    Shape,
    check_same_shape,
    check_same_tokens,
    count_parameters,
    load_tokenizer,
    read_shape,
)
from oprd.objectives import Objective, build_objectives, check_pair
from oprd.objectives.bridge import Bridge
from oprd.teacher.local import Likeness
from oprd.train.checkpoint import find_checkpoint
from oprd.train.extrapolation import validation_prompts
from oprd.train.run_folder import RunFolder
from oprd.train.talking import (
    has_other_terms,
    leaf,
    members,
    omni_term,
    provided_by,
    served_tokenizer,
    served_top_k,
)
from oprd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects handed over from Python in place of names in the recipe."""

    student: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    prompts: datasets.Dataset | None = None


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
        spans=any(reading.at == "spans" for objective in objectives for reading in objective.readings),
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


def check_teachers(
    recipe: Recipe,
    given: Given,
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    *,
    across_shapes: bool,
    across_tokenizers: bool,
    spans: bool,
) -> tuple[dict[str, PreTrainedTokenizerBase], dict[str, Likeness]]:
    """Tokenizer of every teacher by its name and what it shares with the student, after checking that it is enough.

    `spans`: some objective compares probabilities of the text between two pairs.
    """
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
            if spans and recipe.rollout.updates_per_rollout > 1:
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
            _check_shared_ids(tokenizer, theirs, member.model, spans=spans)
        elif not same_tokens:
            aligner_between(tokenizer, tokenizers[name], None, member.model)
    if several and not all(one.tokens for one in likeness.values()):
        other = next(name for name, one in likeness.items() if not one.tokens)
        raise TeacherMismatch(
            f"teacher {other!r} of several has another tokenizer than the student; pairing tokens works with one teacher"
        )
    return tokenizers, likeness


def _check_shared_ids(tokenizer: PreTrainedTokenizerBase, teacher: Shape, name: str, *, spans: bool) -> None:
    """Raise TeacherMismatch where the student's ids cannot even be looked up, or would be given probabilities."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= teacher.vocabulary:
        raise TeacherMismatch(
            f"alignment 'shared_ids' feeds teacher {name} the student's ids, which go up to {largest}; its vocabulary has "
            f"{teacher.vocabulary} rows. Use alignment 'bytes'"
        )
    if spans:
        raise TeacherMismatch(
            f"alignment 'shared_ids': teacher {name} gives probabilities to tokens of its own vocabulary, which mean "
            "nothing for the student's. Use alignment 'bytes'"
        )


def aligner_between(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    generation: Any,
    name: str,
    student_generation: Any = None,
) -> Aligner:
    """Pairs the tokens of two tokenizers. Raises TeacherMismatch for a kind whose bytes are not known."""
    return Aligner(
        student,
        teacher,
        student_stops=stop_ids(student, student_generation),
        teacher_end=end_of_turn(teacher, stop_ids(teacher, generation)),
        teacher_name=name,
    )


def needs_start(stages: tuple[tuple[Objective, ...], ...]) -> bool:
    """Whether a bridge compares with the student as it was before training."""
    return any(not bridge.in_projections for bridge in bridges_of(stages))


def bridges_of(stages: tuple[tuple[Objective, ...], ...]) -> list[Bridge]:
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
            f"extrapolation.score is 'accuracy', but row {bare.row} of {recipe.data.prompts} has no {recipe.data.answer!r} "
            "(data.answer); set extrapolation.score=objective, name the column, or add the answers"
        )


def _disk_gib(recipe: Recipe, student: str | PreTrainedModel) -> float:
    """Checkpoints hold weights, two moments and the snapshots of extrapolation of what is trained, in float32; the student
    is written once more."""
    parameters = count_parameters(student, recipe.student.gguf_file)
    config = recipe.extrapolation
    copies = 3 + (0 if config is None else 2 if config.triggers == "settled" else 1)
    if recipe.student.lora is not None:
        return 0.02 + parameters * 0.05 * 4 * copies * (recipe.save_total_limit + 1) / 2**30
    return (parameters * 4 * copies * (recipe.save_total_limit + 1) + parameters * 4) / 2**30
