"""The loop: the student writes, the teacher answers, the student learns; the rest is book-keeping."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from oprd.algorithm import collect
from oprd.config import recipe_to_yaml
from oprd.data.chat import decode, encode, end_of_turn
from oprd.data.collate import collate_student, split_by_tokens
from oprd.errors import Interrupted, ServerError, TrainingStopped
from oprd.evaluate.run import Evaluation, evaluate, evaluation_from
from oprd.evaluate.verify import Verifier
from oprd.kernels.chunked import sampled_logprobs
from oprd.objectives.base import Objective
from oprd.objectives.bridge import Bridge
from oprd.progress import Bar, console, progress_bar
from oprd.rollout.base import Sampling
from oprd.train.build import Run, enter_stage
from oprd.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from oprd.train.fit_bridge import needs_refit, refit
from oprd.train.health import Health, health_from_sums, health_readings, health_sample, measure
from oprd.train.log import Clock, Interrupt, derive_seed, peak_memory_gib
from oprd.train.run_folder import read_jsonl, write_atomically
from oprd.train.save import save_student
from oprd.train.validation import validate
from oprd.types import HiddenTargets, MicroBatch, Prompt, Reading, Rollouts, States, TokenSelection, concatenate

TRUNCATED_ALARM = 0.1
"""Above this share of truncated completions in a step the user is warned, once."""
SAMPLES_PER_STEP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished run has to show."""

    steps: int
    skipped_steps: int
    seconds: float
    """Of training, evaluations included, over all starts of the run."""
    evaluations: tuple[Evaluation, ...]
    """The last of each benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimizer step, over all processes."""

    losses: tuple[float, ...]
    """Weighted mean of each objective before its coefficient."""
    supervised: tuple[int, ...]
    """Supervised tokens of each objective."""
    grad_norm: float
    finite: bool
    """False: the step was skipped."""


@dataclass(kw_only=True)
class Progress:
    """What the loop remembers between steps; stored in every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    warned_of_truncation: bool = False


def train(run: Run) -> Result:
    """Train to the last step, evaluate, save the student. Resumes where the recipe says so.

    Raises TrainingStopped after too many skipped steps in a row or when a teacher's server gives out, Interrupted when the
    user asked to stop.
    """
    recipe, accelerator = run.recipe, run.accelerator
    done = run.folder.path / "result.json"
    if recipe.resume_from_checkpoint is not None and done.is_file():
        console.print(f"{run.folder.path} is finished already; nothing to do.")
        return _read_result(done)
    progress = _start(run)
    shown = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        stack.callback(run.teacher.close)
        judged = run.benchmarks or (recipe.extrapolation is not None and recipe.extrapolation.score == "accuracy")
        verifier = stack.enter_context(Verifier(timeout_s=recipe.evaluation.verify_timeout_s)) if judged else None
        if recipe.eval_steps is not None and progress.step == 0:
            _evaluate(run, progress, verifier)
        label, ends = run.folder.path.name, recipe.last_steps()
        bar = stack.enter_context(progress_bar(label, ends[-1], done=progress.step, shown=shown))
        while progress.step < ends[-1]:
            if progress.step == ends[run.stage]:
                run = enter_stage(run, run.stage + 1)
            if needs_refit(run, progress.step):
                refit(run, progress.step)
            start = time.perf_counter()
            _step(run, progress, bar, verifier)
            progress.seconds += time.perf_counter() - start
            last = progress.step == ends[-1]
            if recipe.eval_steps is not None and progress.step % recipe.eval_steps == 0 and not last:
                _evaluate(run, progress, verifier)
            stop = _any(run, interrupt.asked)
            if stop or last or progress.step % recipe.save_steps == 0:
                _save(run, progress)
            if stop and not last:
                raise Interrupted(f"stopped after step {progress.step}")
        evaluations = _evaluate(run, progress, verifier)
    result = Result(
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        seconds=round(progress.seconds, 1),
        evaluations=evaluations,
    )
    save_student(run, evaluations)
    if accelerator.is_main_process:
        write_atomically(done, json.dumps(dataclasses.asdict(result), indent=2))
    if recipe.report_to:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    return result


def _step(run: Run, progress: Progress, bar: Bar, verifier: Verifier | None) -> None:
    """One step of the method, and its line in metrics.jsonl: one rollout, and the updates made with it."""
    recipe, rank = run.recipe, run.accelerator.process_index
    step = progress.step + 1
    clock = Clock(run.accelerator.device)
    with clock.section("rollout"):
        written, learned = _rollouts_or_stop(run, progress)
    if recipe.rollout.updates_per_rollout > 1 and any(o.importance_weighted for o in run.objectives):
        with clock.section("update"):
            learned = _with_logprobs(run, learned)
    learning_rate = run.scheduler.get_last_lr()[0]
    updates = []
    for number in range(recipe.rollout.updates_per_rollout):
        torch.manual_seed(derive_seed(recipe.seed, "update", step, number, rank))  # dropout
        updates.append(update_step(run, learned, clock))
        if updates[-1].finite:
            run.scheduler.step()
        progress.skipped_in_a_row = 0 if updates[-1].finite else progress.skipped_in_a_row + 1
        progress.skipped_steps += not updates[-1].finite
    update = _mean_of(updates)
    progress.step = step
    health = _health(run, written) if recipe.health_tokens and step % recipe.logging_steps == 0 else None
    metrics = _metrics(run, update, health, written) | {"train/learning_rate": learning_rate}
    metrics |= _extrapolate(run, step, clock, verifier)
    bar.advance(1, _note(run.objectives, update, health))
    if run.accelerator.is_main_process and step % recipe.logging_steps == 0:
        skipped = {"train/skipped_steps/total": progress.skipped_steps}
        machine = clock.metrics() | {"memory/peak_gib": round(peak_memory_gib(run.accelerator.device), 3)}
        run.folder.append(run.folder.metrics, {"step": step} | metrics | skipped | machine)
        run.accelerator.log(metrics | skipped | machine, step=step)
        for row in _samples(run, written):
            run.folder.append(run.folder.samples, {"step": step} | row)
    _warn_of_truncation(run, progress, float(metrics["rollout/truncated/share"]))
    if progress.skipped_in_a_row >= recipe.max_skipped_steps:
        raise TrainingStopped(
            f"{progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient, or nothing to learn on (losses "
            f"{[round(x, 4) for x in update.losses]}, gradient norm {update.grad_norm}); the last is step {step}. "
            f"Lower learning_rate ({recipe.learning_rate}), or look at {run.folder.samples}. "
            f"Checkpoints in {run.folder.checkpoints} are from before"
        )


def update_step(run: Run, rollouts: Rollouts, clock: Clock) -> Update:
    """One optimizer step on the rollouts of all processes.

    Each objective's sum over tokens is divided once, by its divisor over all micro-batches and processes: however the
    batch is split, the update is the same. A process with fewer micro-batches repeats its first with weight zero.
    """
    accelerator, objectives = run.accelerator, run.objectives
    micros = split_by_tokens(rollouts, run.recipe.micro_batch_tokens)
    divisors = [objective.divisor(rollouts) for objective in objectives]
    counts = [float(sum(rollouts.supervised(objective.tokens))) for objective in objectives]
    everywhere = _gather(run, [float(len(micros)), *divisors, *counts])
    passes = int(everywhere[:, 0].max())
    denominators, supervised = everywhere[:, 1:].sum(0).split(len(objectives))
    # where the teacher's answers on all completions were lost or unusable there is nothing to learn, and no step is made
    learnable = bool((denominators > 0).any())
    denominators = denominators.clamp(min=1e-9)
    if not bool((supervised > 0).all()):
        raise TrainingStopped(
            "no token of this step is supervised: every completion is empty. Does the chat template end the prompt where "
            "the assistant starts to write, and is the stop token not the first thing it writes?"
            if rollouts.pairings is None
            else "no token of this step ends where one of the teacher's ends, so none is supervised. Does the student write "
            "text, and does the teacher's tokenizer keep it as it is?"
        )
    sums = torch.zeros(len(objectives), dtype=torch.float64)
    run.model.train()
    for number in range(passes):
        real = number < len(micros)
        micro = micros[number] if real else micros[0]
        with clock.section("teacher"):
            targets = run.teacher.targets(micro, run.teacher_readings, head=run.uses_head)
        last = number == passes - 1
        with clock.section("update"), contextlib.nullcontext() if last else accelerator.no_sync(run.model):
            values = run.model(_student_batch(run, micro), targets)
            # weighted on the device, one entry per supervised token of the micro-batch
            totals_here = [
                (value * _token_weights(objective, micro, value) * real).sum()
                for objective, value in zip(objectives, values, strict=True)
            ]
            loss = sum(
                o.coefficient * total / float(d)
                for o, total, d in zip(objectives, totals_here, denominators, strict=True)
            )
            # DDP and FSDP average gradients over processes; the denominator already counts all of them
            accelerator.backward(loss * accelerator.num_processes)
            sums += torch.stack([total.detach().double().cpu() for total in totals_here])
    with clock.section("update"):
        grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.max_grad_norm)
        norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else cast(torch.Tensor, grad_norm))
        losses = (_gather(run, sums.tolist()).sum(0) / denominators).tolist()
        finite = learnable and math.isfinite(norm) and all(map(math.isfinite, losses))
        if finite:
            run.optimizer.step()
        run.optimizer.zero_grad()
    return Update(losses=tuple(losses), supervised=tuple(map(int, supervised.tolist())), grad_norm=norm, finite=finite)


def _student_batch(run: Run, rollouts: Rollouts) -> MicroBatch:
    return collate_student(rollouts, pad_id=run.lm.pad_id, device=run.accelerator.device)


def _mean_of(updates: Sequence[Update]) -> Update:
    """The updates made with one rollout as one line: means of losses and norms."""
    n = len(updates)
    return Update(
        losses=tuple(sum(losses) / n for losses in zip(*(update.losses for update in updates), strict=True)),
        supervised=updates[0].supervised,
        grad_norm=sum(update.grad_norm for update in updates) / n,
        finite=all(update.finite for update in updates),
    )


def _with_logprobs(run: Run, rollouts: Rollouts) -> Rollouts:
    """The rollouts, in another order, with the log-probabilities of their tokens under the weights that wrote them.

    By the trainer's own forward pass, because an engine's may differ by its precision.
    """
    reading = Reading(block="last", at="prediction", tokens=TokenSelection(keep="all"))

    def sampled(states: States) -> torch.Tensor:
        assert states.head is not None
        ids = states.batch.sampled_ids(reading.tokens)
        return sampled_logprobs(states.hidden[reading], states.head, ids).cpu()

    micros = split_by_tokens(rollouts, run.recipe.micro_batch_tokens)
    run.model.eval()
    done = []
    for number in range(int(_gather(run, [float(len(micros))]).max())):
        micro = micros[number] if number < len(micros) else micros[0]  # sharded: equal passes everywhere
        logprobs = run.read(_student_batch(run, micro), (reading,), True, sampled).split(micro.lengths)
        done.append(dataclasses.replace(micro, logprobs=tuple(tuple(row.tolist()) for row in logprobs)))
    return concatenate(done[: len(micros)])


def _sampling(run: Run, step: int) -> Sampling:
    rollout = run.recipe.rollout
    return Sampling(
        temperature=rollout.sampling_temperature,
        top_p=rollout.top_p,
        max_tokens=rollout.length_at(step),
        samples=rollout.group_size,
    )


def _extrapolate(run: Run, step: int, clock: Clock, verifier: Verifier | None) -> dict[str, float]:
    """Go further along the last updates, if that helps; what the step's line says about it."""
    extrapolation = run.extrapolation
    if extrapolation is None:
        return {}
    config = extrapolation.config
    sampling = dataclasses.replace(_sampling(run, step), samples=config.validation_samples)
    with clock.section("extrapolation"):
        found = extrapolation.after_update(step, lambda: validate(run, config, verifier, sampling, step))
    if found is None:
        return {}
    if run.accelerator.is_main_process:
        run.folder.append(run.folder.searches, found)
    return {"extrapolation/factor": found["accepted"], "tokens/extrapolation/sum": found["tokens"]}


def _token_weights(objective: Objective, micro: Rollouts, like: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(objective.weights(micro), dtype=like.dtype)
    return weights.repeat_interleave(torch.tensor(micro.supervised(objective.tokens))).to(like.device)


def _rollouts_or_stop(run: Run, progress: Progress) -> tuple[Rollouts, Rollouts]:
    """`_rollouts`; when a teacher's server gives out on any process, all save what was learned so far and stop."""
    error: ServerError | None = None
    try:
        both = _rollouts(run, progress.step + 1)
    except ServerError as caught:
        error = caught
    if not _any(run, error is not None):
        return both
    _save(run, progress)
    reason = str(error or "the teacher of another process gave out; its message says why").rstrip(".")
    raise TrainingStopped(
        f"{reason}. Stopped before step {progress.step + 1}; a checkpoint is in {run.folder.checkpoints}. "
        "Go on with resume_from_checkpoint=latest"
    ) from None


def _rollouts(run: Run, step: int) -> tuple[Rollouts, Rollouts]:
    """What was written and what is learned on: the student's completions, or on an off-policy step the dataset's (GKD)."""
    recipe = run.recipe
    prompts = run.sampler.batch(step - 1)
    draw = torch.Generator().manual_seed(derive_seed(recipe.seed, "lambda", step))
    if float(torch.rand((), generator=draw)) >= recipe.rollout.lambda_on_policy:
        given = _given_rollouts(run, prompts.prompts, recipe.rollout.length_at(step))
        return given, run.teacher.prepare(given)
    seed = derive_seed(recipe.seed, "rollout", step, run.accelerator.process_index)
    return collect(run.engine, run.teacher, prompts, _sampling(run, step), seed=seed)


def _given_rollouts(run: Run, prompts: Sequence[Prompt], longest: int) -> Rollouts:
    """The dataset's own completions, ended by the stop token unless they are too long."""
    tokenizer = run.lm.tokenizer
    stop = end_of_turn(tokenizer, run.stop_ids)
    ids = [(*encode(tokenizer, prompt.completion or ""), stop) for prompt in prompts]
    return Rollouts(
        prompts=tuple(prompts),
        completion_ids=tuple(row[:longest] for row in ids),
        finished=tuple(len(row) <= longest for row in ids),
    )


def _health(run: Run, rollouts: Rollouts) -> Health | None:
    sample = health_sample(rollouts, run.recipe.health_tokens)
    readings = health_readings(run.lm.num_blocks)
    shared = run.teacher.comparable(sample, readings)
    targets = run.teacher.targets(sample, shared, head=True) if shared else None
    assert targets is None or isinstance(targets, HiddenTargets)
    run.model.eval()
    sums = run.read(_student_batch(run, sample), readings, True, partial(measure, teacher=targets))
    return health_from_sums(_gather(run, sums.tolist()).sum(0))


def _metrics(run: Run, update: Update, health: Health | None, rollouts: Rollouts) -> dict[str, float]:
    """The step's line but for what depends on the machine: equal bit for bit when a run is repeated on one process."""
    lengths = rollouts.lengths
    empty = sum(length == 0 or (length == 1 and done) for length, done in zip(lengths, rollouts.finished, strict=True))
    mine = [len(rollouts), sum(lengths), sum(not done for done in rollouts.finished), empty]
    completions, generated, truncated, empties = _gather(run, list(map(float, mine))).sum(0).tolist()
    tallies = run.teacher.tallies()
    told = _gather(run, [x for tally in tallies for x in (tally.total, tally.of or 0.0)]).sum(0).tolist()
    names = term_names(run.objectives)
    total = sum(o.coefficient * loss for o, loss in zip(run.objectives, update.losses, strict=True))
    return {
        "train/loss/mean": total,
        **{f"train/{name}/mean": loss for name, loss in zip(names, update.losses, strict=True)},
        "train/grad_norm": update.grad_norm,
        "tokens/generated/sum": int(generated),
        "tokens/supervised/sum": max(update.supervised),
        "rollout/length/mean": generated / completions,
        "rollout/truncated/share": truncated / completions,
        "rollout/empty/share": empties / completions,
        **{
            tally.name: total if tally.of is None else total / max(of, 1.0)
            for tally, total, of in zip(tallies, told[::2], told[1::2], strict=True)
        },
        **(health.metrics() if health is not None else {}),
    }


def term_names(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The objectives' names, numbered where a mixture has two of a kind."""
    names = [objective.name for objective in objectives]
    return tuple(f"{n}_{names[: i + 1].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names))


def _samples(run: Run, rollouts: Rollouts) -> list[dict[str, Any]]:
    """The first completion of the first prompts of the step, as text."""
    size = len(rollouts) // len({prompt.row for prompt in rollouts.prompts})
    return [
        {
            "row": rollouts.prompts[i].row,
            "prompt": rollouts.prompts[i].messages[-1].content,
            "completion": decode(run.lm.tokenizer, rollouts.completion_ids[i], special=True),
            "finished": rollouts.finished[i],
            "length": len(rollouts.completion_ids[i]),
        }
        for i in range(0, len(rollouts), size)[:SAMPLES_PER_STEP]
    ]


def _warn_of_truncation(run: Run, progress: Progress, share: float) -> None:
    rollout = run.recipe.rollout
    meant = rollout.length_at(progress.step) < rollout.max_completion_length
    if share <= TRUNCATED_ALARM or progress.warned_of_truncation or meant:
        return
    progress.warned_of_truncation = True
    if run.accelerator.is_main_process:
        console.print(
            f"[yellow]{share:.0%} of the completions of step {progress.step} were cut at max_completion_length="
            f"{rollout.max_completion_length}; raise it, or the student never sees its own endings.[/]"
        )


def _evaluate(run: Run, progress: Progress, verifier: Verifier | None) -> tuple[Evaluation, ...]:
    """Every benchmark at this step, unless a resumed run finds it done."""
    accelerator, config = run.accelerator, run.recipe.evaluation
    known = {(row["step"], row["benchmark"]): row for row in read_jsonl(run.folder.evaluations)}
    alone = run.engine.same_steps  # sharded weights: every process runs every forward pass, so all do all problems
    results = []
    for benchmark in run.benchmarks:
        row = known.get((progress.step, benchmark.name))
        if row is not None:
            results.append(evaluation_from(row))
            continue
        assert verifier is not None
        file = run.folder.path / "evaluations" / f"step-{progress.step:06d}" / f"{benchmark.name}.jsonl"
        start = time.perf_counter()
        label = f"evaluate {benchmark.name}"
        with progress_bar(label, len(benchmark.prompts), shown=accelerator.is_main_process) as bar:
            result = evaluate(
                run.engine,
                run.lm.tokenizer,
                benchmark,
                config,
                verifier,
                save_to=file if accelerator.is_main_process else None,
                on_progress=lambda n, bar=bar: bar.advance(n * (1 if alone else accelerator.num_processes)),
                rank=0 if alone else accelerator.process_index,
                world_size=1 if alone else accelerator.num_processes,
                gather=(lambda rows: rows) if alone else gather_object,
            )
        progress.seconds += time.perf_counter() - start
        results.append(result)
        if accelerator.is_main_process:
            run.folder.append(run.folder.evaluations, {"step": progress.step} | dataclasses.asdict(result))
            accelerator.log({f"eval/{benchmark.name}/avg_at_k": result.avg_at_k}, step=progress.step)
    accelerator.wait_for_everyone()
    return tuple(results)


def _start(run: Run) -> Progress:
    """Create the folder, or go back to the checkpoint that the recipe asks for."""
    recipe, folder, accelerator = run.recipe, run.folder, run.accelerator
    if accelerator.is_main_process:
        folder.create(recipe)
        for objective in (objective for stage in run.stages for objective in stage):
            if isinstance(objective, Bridge):
                write_atomically(folder.path / "bridge.json", json.dumps(objective.told()))
    progress = Progress()
    asked = recipe.resume_from_checkpoint
    found = find_checkpoint(folder.checkpoints, asked) if asked is not None else None
    if found is not None:
        stored = load_checkpoint(
            found, accelerator=accelerator, model=run.model, optimizer=run.optimizer, tensors=_tensors(run)
        )
        progress = Progress(**stored["progress"])
        run.scheduler.load_state_dict(stored["scheduler"])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and asked is not None:
        folder.cut_after(progress.step)
        if found is not None:
            console.print(f"{folder.path}: going on after step {progress.step}.", highlight=False)
    if recipe.report_to:
        accelerator.init_trackers("oprd", config={"recipe": recipe_to_yaml(recipe)})
    accelerator.wait_for_everyone()
    return progress


def _save(run: Run, progress: Progress) -> None:
    save_checkpoint(
        run.folder.checkpoints,
        progress.step,
        accelerator=run.accelerator,
        model=run.model,
        optimizer=run.optimizer,
        state={"progress": dataclasses.asdict(progress), "scheduler": run.scheduler.state_dict()},
        tensors=_tensors(run),
        keep=run.recipe.save_total_limit,
    )


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside weights and optimizer."""
    return run.extrapolation.state() if run.extrapolation is not None else {}


def _note(objectives: Sequence[Objective], update: Update, health: Health | None) -> str:
    losses = " ".join(f"{n} {x:.4f}" for n, x in zip(term_names(objectives), update.losses, strict=True))
    return (
        losses
        + (f" overlap {health.agreement.overlap:.2f}" if health is not None and health.agreement is not None else "")
        + ("" if update.finite else " SKIPPED")
    )


def _gather(run: Run, row: Sequence[float]) -> torch.Tensor:
    """[processes, len(row)] in float64."""
    mine = torch.tensor([row], dtype=torch.float64, device=run.accelerator.device)
    return run.accelerator.gather(mine).cpu()  # type: ignore[union-attr]


def _any(run: Run, flag: bool) -> bool:
    """True on every process when it is true on one."""
    return bool(_gather(run, [float(flag)]).any())


def _read_result(file: Path) -> Result:
    stored = json.loads(file.read_text(encoding="utf-8"))
    return Result(**(stored | {"evaluations": tuple(map(evaluation_from, stored["evaluations"]))}))
