"""From a recipe to the parts of a run: everything cheap is checked first, then servers are asked, then models are loaded."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from oprd.algorithm import Distillation
from oprd.data.prompts import MANY, Prompts, PromptSampler, in_order
from oprd.distributed import Ranks
from oprd.effopd import Extrapolation, validation_prompts
from oprd.errors import ConfigError, DataError
from oprd.evaluate.benchmarks import Benchmark, load_benchmarks
from oprd.models.language_model import FrozenModel, LanguageModel, Model, is_peft
from oprd.models.loading import ModelFacts, frozen_copy, load_frozen, load_student, student_facts
from oprd.models.pretrained import cast_parameters
from oprd.models.probe import Use, check_bf16, check_family, packing
from oprd.objectives.base import Objective
from oprd.progress import console
from oprd.recipe import Recipe
from oprd.rollout.base import EngineContext, RolloutEngine
from oprd.rollout.sources import SourceContext
from oprd.student import InitialStudent, Student
from oprd.teacher.base import Teacher, TeacherContext, TeacherFacts
from oprd.teacher.local import LocalTeacher, Reference
from oprd.train.accelerator import open_accelerator
from oprd.train.checkpoint import find_checkpoint
from oprd.train.pair import Given, check_pairs, check_stops, pair_rows, pair_stops, teacher_context, tell_of_stops
from oprd.train.run_folder import RunFolder
from oprd.types import Capability, Prompt, Taps
from oprd.verify.pool import VerifierPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the cheap checks have read."""

    student: ModelFacts
    teacher: TeacherFacts
    objectives: tuple[Objective, ...]
    """Bound to the student."""
    prompts: Prompts
    benchmarks: tuple[Benchmark, ...]
    context: TeacherContext
    engine: EngineContext


Check = Callable[[Recipe, Given, Checked, Ranks], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A run that is ready to go."""

    recipe: Recipe
    accelerator: Accelerator
    ranks: Ranks
    folder: RunFolder
    method: Distillation
    engine: RolloutEngine
    prompts: Prompts
    sampler: PromptSampler
    benchmarks: tuple[Benchmark, ...]
    extrapolation: Extrapolation | None
    verifier: VerifierPool


def setup(recipe: Recipe, given: Given | None = None, before_loading: Check | None = None) -> Parts:
    """Check, ask, load, wrap. Raises an OprdError for what a user can mend, or what `before_loading` raises."""
    given = given or Given()
    accelerator = open_accelerator(recipe)
    recipe = recipe.model_copy(update={"bf16": accelerator.mixed_precision == "bf16"})
    ranks, initial = Ranks(accelerator), InitialStudent()
    checked = check(recipe, given, ranks, initial)
    folder = _open_folder(recipe, checked)
    if before_loading is not None:
        before_loading(recipe, given, checked, ranks)
    ranks.wait()
    if ranks.is_main:
        _tell(checked)
    teacher = ranks.together(lambda: recipe.teacher.build(checked.teacher, checked.context))
    student = build_student(recipe, given, checked, accelerator, initial)
    for objective in checked.objectives:
        objective.check_models(student.lm, teacher.model.lm if isinstance(teacher, LocalTeacher) else None)
    verifier, rollout = VerifierPool(), recipe.rollout
    engine = rollout.engine.build(student, checked.engine)
    source = rollout.source.bind(
        SourceContext(
            engine=engine, teacher=teacher, tokenizer=student.lm.tokenizer, end_of_turn=student.lm.end_of_turn, 
            stop_ids=frozenset(student.lm.stop_ids), max_new_tokens=rollout.max_completion_length, seed=recipe.seed, ranks=ranks, verifier=verifier,
        )
    )  # fmt: skip
    method = Distillation(
        source=source,
        teacher=teacher,
        reference=build_reference(checked, initial, teacher, ranks.device),
        student=student,
        ranks=ranks,
        micro_batch_tokens=recipe.micro_batch_tokens,
    )
    sampler = PromptSampler(
        checked.prompts, per_step=recipe.prompts_per_step, seed=recipe.seed, rank=ranks.rank, world_size=ranks.size
    )
    config = recipe.extrapolation
    return Parts(
        recipe=recipe,
        accelerator=accelerator,
        ranks=ranks,
        folder=folder,
        method=method,
        engine=engine,
        prompts=checked.prompts,
        sampler=sampler,
        benchmarks=checked.benchmarks,
        extrapolation=None if config is None else Extrapolation(config, student.lm, ranks, student.reshard),
        verifier=verifier,
    )


def check(recipe: Recipe, given: Given, ranks: Ranks, initial: InitialStudent) -> Checked:
    """Everything that can be known before weights are loaded, the run folder aside. Raises an OprdError for the first thing
    that is wrong."""
    student = student_facts(recipe.student, given.student, given.tokenizer)
    if recipe.prompts_per_step % ranks.size:
        raise ConfigError(
            f"prompts_per_step is {recipe.prompts_per_step}, the processes are {ranks.size}; make it a multiple"
        )
    missing = [name for name in recipe.report_to if name not in get_available_trackers()]
    if missing:
        raise ConfigError(
            f"report_to names {missing[0]!r}, which is not installed; pip install {missing[0]}, or drop it"
        )
    recipe.check_optimizer(recipe.student.weights, sharded=ranks.sharded)
    objectives = tuple(objective.bind(student) for objective in recipe.objective)
    if ranks.sharded and (student.adapter or recipe.student.lora is not None):
        _refuse_uneven_passes(recipe, objectives)
    context = teacher_context(recipe, given, student, objectives, ranks, initial)
    teacher = recipe.teacher.facts(context)
    check_pairs(recipe, objectives, teacher)
    for objective in objectives:
        if teacher.model is not None:
            objective.check_pair_facts(student, teacher.model)
    _tell_of_contexts(ranks, student, teacher)
    room, limits = recipe.rollout.max_completion_length, {"context": student.context, "vocabulary": student.vocabulary}
    prompts = Prompts(
        recipe.data, student.tokenizer, **limits, room=room, given=given.prompts,
        view=lambda some: recipe.teacher.render(some, teacher, room),
    )  # fmt: skip
    places = max(recipe.max_steps * recipe.prompts_per_step, MANY)
    used = prompts.prepare(in_order(range(min(places, len(prompts))), len(prompts), recipe.seed))
    recipe.rollout.source.check_prompts(used)
    _check_validation(recipe, objectives, teacher, prompts)
    check_stops(recipe, objectives, pair_stops(student, teacher))
    benchmarks = load_benchmarks(recipe.evaluation, student.tokenizer, **limits, trained_on=recipe.data)
    engine = engine_context(recipe, ranks, used, benchmarks)
    recipe.rollout.engine.check(student, engine)
    return Checked(
        student=student,
        teacher=teacher,
        objectives=objectives,
        prompts=prompts,
        benchmarks=benchmarks,
        context=replace(context, prompts=used, pair_stops=pair_stops(student, teacher)),
        engine=engine,
    )


def _tell(checked: Checked) -> None:
    tell_of_stops(checked.student, checked.context.pair_stops)
    for note in checked.prompts.notes:
        console.print(note)


def _open_folder(recipe: Recipe, checked: Checked) -> RunFolder:
    """The run folder. Raises an OprdError unless the run can begin there, or go on."""
    folder = RunFolder(recipe.output_dir)
    folder.check(recipe, needed_gib=_disk_gib(recipe, checked.student) + _cache_gib(recipe, folder))
    if recipe.resume_from_checkpoint is not None:
        find_checkpoint(folder.checkpoints, recipe.resume_from_checkpoint)
    folder.check_prompts(checked.prompts.digest(recipe.seed))
    return folder


def engine_context(
    recipe: Recipe, ranks: Ranks, prompts: Sequence[Prompt], benchmarks: Sequence[Benchmark] = ()
) -> EngineContext:
    """What the engine is built from, for texts on all these prompts."""
    asked = [(prompts, recipe.rollout.max_completion_length)]
    asked += [(benchmark.prompts, recipe.evaluation.max_completion_length) for benchmark in benchmarks]
    tokens = max(len(prompt.token_ids) + most for some, most in asked for prompt in some)
    return EngineContext(
        ranks=ranks, folder=RunFolder(recipe.output_dir).engine, bf16=recipe.bf16 is True, tokens=tokens
    )


def _tell_of_contexts(ranks: Ranks, student: ModelFacts, teacher: TeacherFacts) -> None:
    for model in (student, teacher.model) if ranks.is_main else ():
        if model is not None and model.context_reason:
            console.print(
                f"{model.name}: prompt and completion have to fit {model.context} tokens; {model.context_reason}."
            )


def build_student(
    recipe: Recipe, given: Given, checked: Checked, accelerator: Accelerator, initial: InitialStudent
) -> Student:
    """The student in its wrapper; `initial` is attached where anything is tapped off it or written by it."""
    model = load_student(recipe.student, given.student, seed=recipe.seed)
    lm = LanguageModel(
        model=model,
        tokenizer=checked.student.tokenizer,
        name=recipe.student.model,
        pair_stops=checked.context.pair_stops,
        rows=pair_rows(checked.student, checked.teacher),
    )
    taps = reduce(or_, (objective.student_taps for objective in checked.objectives))
    check_family(lm, Use(taps=taps | Taps(head=recipe.health_tokens > 0)))
    if recipe.student.torch_compile:
        lm.compile_blocks()
    if recipe.student.gradient_checkpointing:
        lm.recompute_blocks(offload=recipe.student.gradient_checkpointing == "offload")
    lm = packing(lm, recipe.packing)
    needed = _taps_initial(checked.objectives) or any(m.uses_initial_student for m in recipe.teacher.members.values())
    copy = (
        frozen_copy(lm, accelerator.device, lambda: accelerator.autocast()) if needed and not is_peft(model) else None
    )
    updates = recipe.max_steps * recipe.rollout.updates_per_rollout
    writer = _writer(recipe, lm, checked.context)
    if recipe.bf16 and writer is not None:
        check_bf16(lm, writer.lm, lambda: accelerator.autocast())
    student = Student(lm, checked.objectives, accelerator, recipe, updates, writer)
    if needed:
        initial.attach(student, copy)
    return student


def _taps_initial(objectives: tuple[Objective, ...]) -> bool:
    return any(o.reference_taps.hidden and o.reference is None for o in objectives)


def _refuse_uneven_passes(recipe: Recipe, objectives: tuple[Objective, ...]) -> None:
    """Under FSDP a rank that runs a forward pass of the student more than the others waits for them forever."""
    members = recipe.teacher.members
    own = [name for name, config in members.items() if config.uses_initial_student]
    if _taps_initial(objectives) or (own and len(members) > 1):
        reader = f"teacher {own[0]!r} of several is" if own else "an objective taps"
        raise ConfigError(
            f"{reader} the initial student, which of an adapter is the student itself: another number of forward passes on "
            "each rank, which FSDP waits for forever. Use DDP, or train all weights"
        )


def _writer(recipe: Recipe, lm: LanguageModel, context: TeacherContext) -> FrozenModel | None:
    """A copy of the student that writes: in one piece where its weights are sharded, in bfloat16 where it computes so."""
    if recipe.student.weights != "float32" or not (recipe.bf16 or context.sharded):
        return None
    copy = frozen_copy(lm, context.device, contextlib.nullcontext)
    if recipe.bf16:
        cast_parameters(copy.lm.core, torch.bfloat16)
    return copy


def build_reference(checked: Checked, initial: Model, teacher: Teacher, device: torch.device) -> Reference | None:
    """The model of hidden states before training; None where no objective taps it. One by name is compared with the
    teacher, so it computes in the teacher's precision."""
    wanted = {o.reference for o in checked.objectives if o.reference_taps.hidden}
    if not wanted:
        return None
    if len(wanted) > 1:
        raise ConfigError(
            f"the objectives of a recipe share one reference model; these ask for {sorted(map(str, wanted))}"
        )
    (name,) = wanted
    if name is None:
        return Reference(initial)
    use = Use(taps=reduce(or_, (objective.reference_taps for objective in checked.objectives)), text=False)
    dtype = teacher.model.lm.core.dtype if isinstance(teacher, LocalTeacher) else torch.bfloat16
    reference = load_frozen(name, checked.student.tokenizer, device, dtype=dtype, use=use)
    reference.lm = packing(reference.lm, checked.context.packing)
    return Reference(reference)


def _check_validation(
    recipe: Recipe, objectives: tuple[Objective, ...], teacher: TeacherFacts, prompts: Prompts
) -> None:
    """The prompts on which extrapolation compares weights must be there, with answers if these are needed."""
    config = recipe.extrapolation
    if config is None:
        return
    if config.validation_prompts > len(prompts):
        raise ConfigError(
            f"extrapolation.validation_prompts is {config.validation_prompts}, the dataset has {len(prompts)} prompts; "
            "lower it"
        )
    in_text = any(Capability.TEXT in o.requires for o in objectives) or recipe.rollout.source.writes_by_teacher
    if config.score == "objective" and (in_text or Capability.HIDDEN not in teacher.provides):
        raise ConfigError(
            "extrapolation.score 'objective' would ask a teacher that writes or a server again for every candidate, and its "
            "losses do not compare weights; set extrapolation.score=accuracy"
        )
    chosen = validation_prompts(config, prompts, recipe.seed)
    bare = next((prompt for prompt in chosen if prompt.answer is None), None)
    if config.score == "accuracy" and bare is not None:
        raise DataError(
            f"extrapolation.score is 'accuracy', but row {bare.row} of {recipe.data.prompts} has no {recipe.data.answer!r} "
            "(data.answer); set extrapolation.score=objective, name the column, or add the answers"
        )


def _disk_gib(recipe: Recipe, student: ModelFacts) -> float:
    """Checkpoints hold weights, two moments and a snapshot for extrapolation of what is trained, in float32; the student
    is written once more."""
    copies = (3 + (recipe.extrapolation is not None)) * (recipe.save_total_limit + 1)
    if recipe.student.lora is not None:
        return 0.02 + student.parameters * 0.05 * 4 * copies / 2**30
    return student.parameters * 4 * (copies + 1) / 2**30


def _cache_gib(recipe: Recipe, folder: RunFolder) -> float:
    """What a teacher's cache may still grow by, were all completions as long as they may be."""
    rollout, cache = recipe.rollout, folder.teacher_cache
    tokens = recipe.max_steps * recipe.prompts_per_step * rollout.group_size * rollout.max_completion_length
    known = cache.stat().st_size if cache.is_file() else 0
    numbers = 1 + max(objective.top_k_of_teacher for objective in recipe.objective)
    most = max(teacher.cache_bytes(tokens, numbers) for teacher in recipe.teacher.members.values())
    return max(0, most - known) / 2**30
