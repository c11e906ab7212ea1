"""`oprd fit-bridge`: from a recipe with objective `oprd_bridge` to the file it names."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeGuard, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from oprd.bridge.file import BridgeFile, Setting, Side, side_of
from oprd.bridge.fit import (
    Both,
    Pair,
    Sums,
    accumulate,
    measure_cosine,
    solve_all,
    solve_by_gradient,
)
from oprd.bridge.solve import auto_rank
from oprd.config.models import LocalTeacherConfig
from oprd.config.objectives import BridgeConfig, objective_terms
from oprd.config.recipe import Recipe
from oprd.data.chat import stop_ids
from oprd.data.prompts import load_prompts
from oprd.errors import ConfigError, DataError
from oprd.models import LanguageModel, Shape, load_student, load_tokenizer, read_shape, read_states
from oprd.objectives.bridge import Bridge, bridge_pairs, bridge_readings, bridge_setting, check_rank
from oprd.progress import console, progress_bar
from oprd.rollout.hf import HFEngine
from oprd.seeds import derive_seed
from oprd.teacher.base import Teacher
from oprd.teacher.local import LocalTeacher
from oprd.train.build import Run
from oprd.train.check import Checked, Given, check_teachers
from oprd.train.processes import gather
from oprd.train.rollouts import sampling_with
from oprd.train.teachers import build_teacher
from oprd.types import MicroBatch, Prompt, PromptBatch, Reading, Rollouts, States

SAVE_EVERY = 8
"""Batches between two records of an unfinished fit."""
REFIT_BATCHES = 16
"""Steps' worth of fresh rollouts for a new fit during training [ours]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a fit has to show, one entry per pair of blocks."""

    path: Path
    blocks: tuple[tuple[int, int], ...]
    auto_ranks: tuple[int, ...]
    cosine: tuple[float, ...]
    """Held-out mean cosine at the automatic rank; at rank 1 where that is 0."""
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A fit that is ready to go."""

    config: BridgeConfig
    path: Path
    seed: int
    both: Both
    prompts: tuple[Prompt, ...]
    batches: tuple[range, ...]
    """Indices of the prompts that are answered together."""
    write: Callable[[int], Rollouts]
    """The student's completions of a batch, by its number."""
    max_rank: int
    widths: tuple[int, int]
    """Of student and teacher."""
    sides: tuple[Side, Side]
    setting: Setting
    key: str
    """Hash of all of this: only the same fit is gone on with."""

    def nothing_yet(self) -> Sums:
        fit = self.config.fit
        return self.both.nothing_yet(self.widths, features=fit.features, keep_rows=fit.method == "gradient")


def fit_bridge(recipe: Recipe, given: Given | None = None) -> Fitted:
    """Fit and write the bridge. An interrupted fit goes on where it was.

    Raises an OprdError before anything is loaded for what can be known then, and never writes over a file.
    """
    job = prepare_fit(recipe, given or Given())
    sums = job.nothing_yet()
    partial = job.path.with_name(f"{job.path.name}.partial")
    if partial.exists():
        _go_on(sums, partial, job.key)
    with progress_bar(f"fit {job.path.name}", len(job.batches), done=sums.batches) as bar:

        def after_batch(now: Sums) -> None:
            bar.advance(1, f"{int(next(iter(now.fit.values())).count)} rows")
            if now.batches % SAVE_EVERY == 0:
                now.save(partial, job.key)

        accumulate(job.both, sums, job.batches, job.write, held_out=job.config.fit.held_out, after_batch=after_batch)
    if sums.rows:
        solutions = solve_by_gradient(job.both, sums, max_rank=job.max_rank, seed=job.seed)
    else:
        solutions = solve_all(job.both, sums, max_rank=job.max_rank)
    file = BridgeFile(
        student=job.sides[0],
        teacher=job.sides[1],
        setting=job.setting,
        solutions=solutions,
        measured=measure_cosine(job.both, sums, solutions, job.prompts),
    )
    file.save(job.path)
    partial.unlink(missing_ok=True)
    return _fitted(job.path, file)


def prepare_fit(recipe: Recipe, given: Given) -> Job:
    """Check everything cheap, then load both models."""
    config = _bridge_of(recipe)
    path = Path(config.bridge)
    if path.exists():
        raise ConfigError(f"objective.bridge: {path} is there already; give another name, or delete it to fit again")
    teacher_config = recipe.teacher
    if not isinstance(teacher_config, LocalTeacherConfig):
        raise ConfigError(f"a bridge is fitted to one local teacher, not to one of type {teacher_config.type!r}")
    shape = read_shape(given.student or recipe.student.model, recipe.student.gguf_file)
    theirs = read_shape(given.teacher or teacher_config.model, teacher_config.gguf_file)
    widths = (shape.width, theirs.width)
    check_rank(config, *widths)
    pairs = bridge_pairs(config, shape.blocks, theirs.blocks)
    tokenizer = given.tokenizer or load_tokenizer(recipe.student.model, recipe.student.gguf_file)
    tokenizers, likeness = check_teachers(
        recipe, given, shape, tokenizer, across_shapes=True, across_tokenizers=True, spans=False
    )
    prompts = _fit_prompts(recipe, config, given, tokenizer, shape)

    accelerator = Accelerator(mixed_precision="bf16" if recipe.bf16 else "no")
    if accelerator.num_processes > 1:
        raise ConfigError(f"fit-bridge runs in one process, {accelerator.num_processes} were launched")
    student = load_student(recipe.student, given.student).to(accelerator.device)  # type: ignore[arg-type]
    lm = LanguageModel(model=student, tokenizer=tokenizer, name=recipe.student.model)

    def read(batch: MicroBatch, readings: Iterable[Reading], head: bool) -> States:
        with accelerator.autocast():
            return read_states(lm, batch, readings, head=head)

    checked = Checked(
        tokenizer=tokenizer,
        shape=shape,
        prompts=prompts,
        benchmarks=(),
        stages=(),
        teacher_tokenizers=tokenizers,
        likeness=likeness,
    )
    teacher = build_teacher(teacher_config, given, checked, lm, None, accelerator, read, reads_head=False)
    assert isinstance(teacher, LocalTeacher)
    teacher.check_prompts(prompts)
    engine = HFEngine(
        lm,
        stop_ids(tokenizer, lm.core.generation_config),
        max_sequences=recipe.rollout.max_sequences,
        autocast=lambda: accelerator.autocast(),
    )
    size = max(1, recipe.rollout.max_sequences // recipe.rollout.group_size)
    batches = tuple(range(len(prompts))[start : start + size] for start in range(0, len(prompts), size))
    sampling = sampling_with(recipe.rollout, max_tokens=recipe.rollout.max_completion_length)

    def write(number: int) -> Rollouts:
        some = PromptBatch(prompts=tuple(prompts[i] for i in batches[number]))
        return engine.generate(some, sampling, seed=derive_seed(recipe.seed, "fit", number))

    sides = side_of(lm, shape.width), side_of(teacher.lm, theirs.width)
    setting = bridge_setting(config, pairs, alignment=teacher_config.alignment)
    asked = [prompt.token_ids for prompt in prompts]
    told = [*map(asdict, (*sides, setting, sampling)), config.fit.held_out, asked, recipe.seed, size]
    return Job(
        config=config,
        path=path,
        seed=recipe.seed,
        both=_both(lm, read, teacher, config, pairs, recipe.micro_batch_tokens),
        prompts=prompts,
        batches=batches,
        write=write,
        max_rank=min(config.fit.max_rank, *widths),
        widths=widths,
        sides=sides,
        setting=setting,
        key=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    )


def refit(run: Run, step: int) -> int:
    """Fit the bridges of the stage again, on fresh rollouts of the student as it is after `step` steps.

    Returns the tokens that all processes generated for it.
    """
    generated = 0
    for number, bridge in enumerate(run.stage.objectives):
        if not _is_due(bridge, step):
            continue
        both = _both(
            run.lm,
            lambda batch, readings, head: run.read(batch, readings, head),
            run.teacher,
            bridge.config,
            bridge.pairs,
            run.recipe.micro_batch_tokens,
        )
        widths = (bridge.file.student.width, bridge.file.teacher.width)
        sums = both.nothing_yet(widths, features=0)  # projections use none
        batches = [run.sampler.batch(step + i).prompts for i in range(REFIT_BATCHES)]
        sampling = sampling_with(run.recipe.rollout, max_tokens=run.recipe.rollout.max_completion_length)

        def write(i: int, batches=batches, sampling=sampling, number=number) -> Rollouts:
            nonlocal generated
            seed = derive_seed(run.recipe.seed, "refit", step, number, i, run.accelerator.process_index)
            rollouts = run.engine.generate(PromptBatch(prompts=batches[i]), sampling, seed=seed)
            generated += sum(rollouts.lengths)
            return rollouts

        first = [sum(map(len, batches[:i])) for i in range(len(batches))]
        accumulate(
            both,
            sums,
            [range(start, start + len(batch)) for start, batch in zip(first, batches, strict=True)],
            write,
            held_out=bridge.config.fit.held_out,
            after_batch=lambda _: None,
        )
        for moments in (*sums.fit.values(), *sums.held_out.values()):
            for _, tensor in moments.tensors():
                tensor.copy_(cast(torch.Tensor, run.accelerator.reduce(tensor, "sum")))
        bridge.refit(solve_all(both, sums, max_rank=max(bridge.ranks)))
    return int(gather(run, [float(generated)]).sum())


def needs_refit(run: Run, step: int) -> bool:
    """Whether a bridge of the stage is to be fitted again before the update of step `step` + 1."""
    return any(_is_due(objective, step) for objective in run.stage.objectives)


def _is_due(objective: object, step: int) -> TypeGuard[Bridge]:
    every = objective.config.refit_every if isinstance(objective, Bridge) else None
    return every is not None and step > 0 and step % every == 0


def _bridge_of(recipe: Recipe) -> BridgeConfig:
    """The recipe's objective; of several stages that read one file, the first."""
    found: dict[str, BridgeConfig] = {}
    for stage in recipe.schedule():
        for term in objective_terms(stage.objective):
            if isinstance(term, BridgeConfig):
                found.setdefault(term.bridge, term)
    if len(found) != 1:
        raise ConfigError(f"fit-bridge needs a recipe with one objective.bridge to write; this one has {len(found)}")
    return next(iter(found.values()))


def _go_on(sums: Sums, partial: Path, key: str) -> None:
    try:
        sums.load(partial, key)
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{partial} is no record of an interrupted fit ({error}); delete it") from error
    console.print(f"{partial}: going on after {sums.batches} batches.", highlight=False)


def _both(
    lm: LanguageModel,
    read: Callable[..., States],
    teacher: Teacher,
    config: BridgeConfig,
    pairs: tuple[tuple[int, int], ...],
    micro_batch_tokens: int,
) -> Both:
    student, others = bridge_readings(config, pairs)
    return Both(
        lm=lm,
        read=read,
        teacher=teacher,
        pairs=tuple(
            Pair(block=block, student=ours, teacher=theirs)
            for (block, _), ours, theirs in zip(pairs, student, others, strict=True)
        ),
        micro_batch_tokens=micro_batch_tokens,
        confidence=config.fit.confidence,
    )


def _fit_prompts(
    recipe: Recipe, config: BridgeConfig, given: Given, tokenizer: PreTrainedTokenizerBase, shape: Shape
) -> tuple[Prompt, ...]:
    data = recipe.data if config.fit.prompts is None else replace(recipe.data, prompts=config.fit.prompts)
    data = replace(data, limit=min(config.fit.limit, data.limit or config.fit.limit))
    prompts = load_prompts(
        data,
        tokenizer,
        context=shape.context,
        room=recipe.rollout.max_completion_length,
        given=given.prompts if config.fit.prompts is None else None,
    )
    if int(len(prompts) * config.fit.held_out) < 1:
        raise DataError(
            f"{data.prompts} has {len(prompts)} prompts, of which held_out={config.fit.held_out} leaves none to measure "
            "on; give more prompts or a larger share"
        )
    return prompts


def _fitted(path: Path, file: BridgeFile) -> Fitted:
    ranks = tuple(auto_rank(file.solutions[block].canonical) for block, _ in file.setting.blocks)
    cosine = [file.measured[block].cosine for block, _ in file.setting.blocks]
    return Fitted(
        path=path,
        blocks=file.setting.blocks,
        auto_ranks=ranks,
        cosine=tuple(float(c[min(max(r, 1), len(c)) - 1]) for c, r in zip(cosine, ranks, strict=True)),
        rows=min(measured.rows for measured in file.measured.values()),
    )
