"""The loop: the student writes, the teacher answers, the student learns; the rest is book-keeping."""

import contextlib
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object

from oprd.config.reading import recipe_to_yaml
from oprd.errors import Interrupted, ServerError, TrainingStopped
from oprd.evaluate.run import Evaluation, evaluate, evaluation_from
from oprd.evaluate.verify import Verifier
from oprd.objectives.bridge import Bridge
from oprd.progress import Bar, console, progress_bar
from oprd.seeds import derive_seed
from oprd.train.build import Run, enter_next_stage
from oprd.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from oprd.train.fit_bridge import needs_refit, refit
from oprd.train.log import Clock, Interrupt, peak_memory_gib
from oprd.train.processes import anywhere
from oprd.train.record import measure_health, progress_note, some_samples, step_metrics
from oprd.train.rollouts import rollouts_of_step, sampling_with, with_logprobs
from oprd.train.run_folder import read_jsonl, write_atomically
from oprd.train.save import save_student
from oprd.train.update import mean_of, update_step
from oprd.train.validation import validate
from oprd.types import Rollouts

TRUNCATED_ALARM = 0.1
"""Above this share of truncated completions in a step the user is warned, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished run has to show."""

    steps: int
    skipped_steps: int
    seconds: float
    """Of training, evaluations included, over all starts of the run."""
    evaluations: tuple[Evaluation, ...]
    """The last of each benchmark."""


@dataclass(kw_only=True)
class Progress:
    """What the loop remembers between steps; stored in every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Of the steps, searches of the extrapolation and new fits of a bridge included."""
    evaluation_seconds: float = 0.0
    generated_tokens: int = 0
    """By the student for its steps, searches and new fits, over all processes."""
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
            if progress.step == ends[run.stage.number]:
                run = enter_next_stage(run)
            if needs_refit(run, progress.step):
                start = time.perf_counter()
                progress.generated_tokens += refit(run, progress.step)
                progress.seconds += time.perf_counter() - start
            _step(run, progress, bar, verifier)
            last = progress.step == ends[-1]
            if recipe.eval_steps is not None and progress.step % recipe.eval_steps == 0 and not last:
                _evaluate(run, progress, verifier)
            stop = anywhere(run, interrupt.asked)
            if stop or last or progress.step % recipe.save_steps == 0:
                _save(run, progress)
            if stop and not last:
                raise Interrupted(f"stopped after step {progress.step}")
        evaluations = _evaluate(run, progress, verifier)
    result = Result(
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        seconds=round(progress.seconds + progress.evaluation_seconds, 1),
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
    step, start = progress.step + 1, time.perf_counter()
    clock = Clock(run.accelerator.device)
    with clock.section("rollout"):
        written, learned = _rollouts_or_stop(run, progress)
    weighted = any(objective.importance_weighted for objective in run.stage.objectives)
    if recipe.rollout.updates_per_rollout > 1 and weighted and learned.sampled:
        with clock.section("update"):
            learned = with_logprobs(run, learned)
    learning_rate = run.stage.scheduler.get_last_lr()[0]
    updates = []
    for number in range(recipe.rollout.updates_per_rollout):
        torch.manual_seed(derive_seed(recipe.seed, "update", step, number, rank))  # dropout
        updates.append(update_step(run, learned, clock))
        if updates[-1].finite:
            run.stage.scheduler.step()
    update = mean_of(updates)
    progress.skipped_in_a_row = 0 if update.finite else progress.skipped_in_a_row + 1
    progress.skipped_steps += not update.finite
    progress.step = step
    health = measure_health(run, written) if recipe.health_tokens and step % recipe.logging_steps == 0 else None
    metrics = step_metrics(run, update, health, written) | {"train/learning_rate": learning_rate}
    if len(updates) > 1:
        metrics |= {"train/skipped_updates/sum": sum(not one.finite for one in updates)}
    searched = _extrapolate(run, step, clock, verifier)
    metrics |= searched
    bar.advance(1, progress_note(run.stage.objectives, update, health))
    progress.generated_tokens += int(metrics["tokens/generated/sum"] + searched.get("tokens/extrapolation/sum", 0))
    progress.seconds += time.perf_counter() - start
    # what a search cost is never left out
    if run.accelerator.is_main_process and (searched or step % recipe.logging_steps == 0):
        metrics |= {
            "train/skipped_steps/total": progress.skipped_steps,
            "tokens/generated/total": progress.generated_tokens,
        }
        machine = clock.metrics() | {
            "training_seconds/total": round(progress.seconds, 3),
            "memory/peak_gib": round(peak_memory_gib(run.accelerator.device), 3),
        }
        run.folder.append(run.folder.metrics, {"step": step} | metrics | machine)
        run.accelerator.log(metrics | machine, step=step)
        for row in some_samples(run, written):
            run.folder.append(run.folder.samples, {"step": step} | row)
    _warn_of_truncation(run, progress, float(metrics["rollout/truncated/share"]))
    if progress.skipped_in_a_row >= recipe.max_skipped_steps:
        raise TrainingStopped(
            f"{progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient, or nothing to learn on (losses "
            f"{[round(x, 4) for x in update.losses]}, gradient norm {update.grad_norm}); the last is step {step}. "
            f"Lower learning_rate ({recipe.learning_rate}), or look at {run.folder.samples}. "
            f"Checkpoints in {run.folder.checkpoints} are from before"
        )


def _extrapolate(run: Run, step: int, clock: Clock, verifier: Verifier | None) -> dict[str, float]:
    """Go further along the last updates, if that helps; what the step's line says about it."""
    extrapolation = run.stage.extrapolation
    if extrapolation is None:
        return {}
    config, rollout = extrapolation.config, run.recipe.rollout
    # the answer stands at the end: completions that a schedule still cuts short would all be wrong, and every tie accepted
    longest = rollout.max_completion_length if config.score == "accuracy" else rollout.length_at(step)
    sampling = sampling_with(rollout, max_tokens=longest, samples=config.validation_samples)
    with clock.section("extrapolation"):
        found = extrapolation.after_update(step, lambda: validate(run, config, verifier, sampling, step))
    if found is None:
        return {}
    if run.accelerator.is_main_process:
        run.folder.append(run.folder.searches, found)
    return {"extrapolation/factor": found["accepted"], "tokens/extrapolation/sum": found["tokens"]}


def _rollouts_or_stop(run: Run, progress: Progress) -> tuple[Rollouts, Rollouts]:
    """`_rollouts`; when a teacher's server gives out on any process, all save what was learned so far and stop."""
    error: ServerError | None = None
    try:
        both = rollouts_of_step(run, progress.step + 1)
    except ServerError as caught:
        error = caught
    if not anywhere(run, error is not None):
        return both
    _save(run, progress)
    reason = str(error or "the teacher of another process gave out; its message says why").rstrip(".")
    raise TrainingStopped(
        f"{reason}. Stopped before step {progress.step + 1}; a checkpoint is in {run.folder.checkpoints}. "
        "Go on with resume_from_checkpoint=latest"
    ) from None


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
        progress.evaluation_seconds += time.perf_counter() - start
        results.append(result)
        if accelerator.is_main_process:
            cost = {"training_seconds": round(progress.seconds, 3), "generated_tokens": progress.generated_tokens}
            run.folder.append(run.folder.evaluations, {"step": progress.step} | cost | dataclasses.asdict(result))
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
            found,
            accelerator=accelerator,
            model=run.stage.model,
            trained=run.stage.trained,
            optimizer=run.stage.optimizer,
            tensors=_tensors(run),
        )
        progress = Progress(**stored["progress"])
        run.stage.scheduler.load_state_dict(stored["scheduler"])
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
        model=run.stage.model,
        trained=run.stage.trained,
        optimizer=run.stage.optimizer,
        state={"progress": dataclasses.asdict(progress), "scheduler": run.stage.scheduler.state_dict()},
        tensors=_tensors(run),
        keep=run.recipe.save_total_limit,
    )


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside weights and optimizer."""
    return run.stage.extrapolation.state() if run.stage.extrapolation is not None else {}


def _read_result(file: Path) -> Result:
    stored = json.loads(file.read_text(encoding="utf-8"))
    return Result(**(stored | {"evaluations": tuple(map(evaluation_from, stored["evaluations"]))}))
