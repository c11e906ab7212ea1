"""The loop: steps of the method, and around them extrapolation, metrics, evaluations and checkpoints."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from oprd.algorithm import mean_update
from oprd.clock import Clock, peak_memory_gib
from oprd.errors import Interrupted, ServerError, TrainingStopped
from oprd.evaluate.evaluate import Evaluation, Evaluator
from oprd.files import append_jsonl, read_json, write_json
from oprd.progress import Bar, console, progress_bar
from oprd.recipe import recipe_to_yaml
from oprd.train.checkpoint import checkpoints, forget_after, load_checkpoint, whole_checkpoint
from oprd.train.interrupt import Interrupt
from oprd.train.metrics import (
    advice_on_cuts,
    diagnostics,
    logprob_difference,
    mass_on_stops,
    progress_note,
    some_samples,
    step_metrics,
)
from oprd.train.rollouts import few_fresh, sampling_at, updates_on, write_ahead
from oprd.train.save import save_student, write_card
from oprd.train.saving import Saving
from oprd.train.setup import Parts
from oprd.train.validation import validate
from oprd.types import Rollouts

TRUNCATED_ALARM = 0.1
"""Above this share of truncated completions in a step the user is warned, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The numbers of a finished run."""

    steps: int
    skipped_steps: int
    seconds: float
    """Of training, evaluations included, over all starts of the run."""
    evaluations: tuple[Evaluation, ...]
    """The last of each benchmark."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Of an earlier start. Raises RunFolderError if the file is damaged."""
        stored = read_json(file, remedy="delete it, and the run ends again from its last step")
        stored["evaluations"] = tuple(map(Evaluation.from_row, stored["evaluations"]))
        return cls(**stored)


@dataclass(kw_only=True)
class Progress:
    """What the loop remembers between steps; stored in every checkpoint."""

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Of the steps, searches of the extrapolation included."""
    evaluation_seconds: float = 0.0
    generated_tokens: int = 0
    """By the student for its steps and searches, over all ranks."""
    warned_of_truncation: bool = False


def train(parts: Parts) -> Result:
    """Train to the last step, evaluate, save the student. Resumes where the recipe says so.

    Raises TrainingStopped after too many skipped steps in a row or when a teacher's server gives out, Interrupted when the
    user asked to stop.
    """
    recipe, ranks, done = parts.recipe, parts.ranks, parts.folder.path / "result.json"
    resuming = recipe.resume_from_checkpoint is not None and done.is_file()
    if resuming and (result := Result.read(done)).steps >= recipe.max_steps:
        console.print(f"{parts.folder.path} is finished already; nothing to do.")
        return result
    with contextlib.ExitStack() as stack:
        stack.callback(parts.folder.release)
        progress = _start(parts)
        interrupt = stack.enter_context(Interrupt())
        stack.callback(parts.method.teacher.close)
        stack.callback(parts.engine.close)
        stack.enter_context(parts.verifier)
        saving = Saving(
            parts.folder.checkpoints, parts.method.student, ranks, recipe.save_steps, recipe.save_total_limit
        )
        save = partial(_save, parts, progress, saving)
        stack.enter_context(_rescue(parts, progress, saving, save))
        stop = partial(_stop_if_asked, parts, progress, interrupt, saving, save)
        label = parts.folder.path.name
        bar = stack.enter_context(progress_bar(label, recipe.max_steps, done=progress.step, shown=ranks.is_main))
        while progress.step < recipe.max_steps:
            # a run that stopped during an evaluation makes up for it
            if recipe.eval_steps is not None and progress.step % recipe.eval_steps == 0:
                _evaluate(parts, progress, stop)
            _step(parts, progress, bar)
            if progress.step == recipe.max_steps or saving.due(progress.step):
                save()
            stop()
        save_student(parts)
        evaluations = _evaluate(parts, progress, stop)
        saving.finish()
    result = Result(
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        seconds=round(progress.seconds + progress.evaluation_seconds, 1),
        evaluations=evaluations,
    )
    if ranks.is_main:
        write_card(parts, evaluations)
        write_json(done, asdict(result))
    if recipe.report_to:
        parts.accelerator.end_training()
    ranks.wait()
    return result


def _save(parts: Parts, progress: Progress, saving: Saving) -> None:
    def state() -> dict[str, Any]:
        return {"progress": asdict(progress), "logs": parts.folder.sync_logs(), "processes": parts.ranks.size}

    saving.begin(progress.step, state, _tensors(parts))


def _tensors(parts: Parts) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside weights and optimizer."""
    return parts.extrapolation.state() if parts.extrapolation is not None else {}


def _stop_if_asked(
    parts: Parts, progress: Progress, interrupt: Interrupt, saving: Saving, save: Callable[[], None]
) -> None:
    """If the user asked any rank to stop, save the step and raise Interrupted. Raises what went wrong with a checkpoint."""
    asked, failed = parts.ranks.all_gather([interrupt.asked, saving.failed]).max(0).values.tolist()
    if asked or failed:
        saving.finish()
    if asked:
        if progress.step:
            save()
            saving.finish()
        raise Interrupted(f"stopped after step {progress.step}", interrupt.signal)


@contextlib.contextmanager
def _rescue(parts: Parts, progress: Progress, saving: Saving, save: Callable[[], None]) -> Iterator[None]:
    """Whatever error ends the run, the last whole step is saved first, or the last one saved is named."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        # of several ranks only these errors are known to be raised by all
        stopped = isinstance(error, ServerError | TrainingStopped)
        together = stopped or parts.ranks.size == 1
        if together or not parts.ranks.sharded:
            saving.wait()
        if together and progress.step and parts.method.student.between_steps:
            try:
                save()
                saving.finish()
            except Exception as also:
                console.print(f"Step {progress.step} could not be saved ({also}).")
        saved = checkpoints(parts.folder.checkpoints)
        if not stopped:
            console.print(f"The last checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet.")
            raise
        kept = (
            f"a checkpoint is in {saved[-1]}. Go on with resume_from_checkpoint=latest"
            if saved
            else "there is no checkpoint yet"
        )
        raise TrainingStopped(f"{str(error).rstrip('.')}. Stopped before step {progress.step + 1}; {kept}") from error


def _step(parts: Parts, progress: Progress, bar: Bar) -> None:
    """One step of the method, its search if one is due, and its line in metrics.jsonl."""
    recipe, method, step = parts.recipe, parts.method, progress.step + 1
    start = time.perf_counter()
    clock = Clock(parts.ranks.device, transfer=parts.engine.transfer, waiting=parts.ranks.waiting)
    with clock.section("rollout"):
        written, rollouts = method.collect(parts.sampler.batch(step - 1), sampling_at(parts, step), step)
        stale = written.staleness > 0
        fresh = parts.ranks.together(lambda: few_fresh(parts, written, step)) if stale else written
        compared = _compared(parts, fresh)
        write_ahead(parts, step + 1)
    told = step == 1 and recipe.health_tokens and method.student.lm.pair_stops
    if told and (note := mass_on_stops(method, written)) and parts.ranks.is_main:
        console.print(note)
    learning_rate = method.student.learning_rate
    updates = updates_on(parts, rollouts, step, clock)
    update = mean_update(updates)
    progress.skipped_in_a_row = 0 if update.finite else progress.skipped_in_a_row + 1
    progress.skipped_steps += not update.finite
    progress.step, method.student.between_steps = step, True
    logged = step % recipe.logging_steps == 0
    metrics = step_metrics(method, update, written, step) | compared
    if logged and recipe.health_tokens:
        metrics |= diagnostics(method, written, recipe.health_tokens)
    metrics["train/learning_rate/last"] = learning_rate
    if recipe.rollout.rollouts_ahead:
        metrics["rollout/staleness/last"] = written.staleness
    if len(updates) > 1:
        metrics["train/skipped_updates/sum"] = sum(not one.finite for one in updates)
    searched = _extrapolate(parts, step, clock)
    bar.advance(1, progress_note(method, update, metrics))
    progress.generated_tokens += int(metrics["tokens/generated/sum"] + searched.get("tokens/extrapolation/sum", 0))
    progress.seconds += time.perf_counter() - start
    if logged or searched:  # what a search cost is never left out
        _log(parts, progress, metrics | searched, clock, written)
    _warn_of_truncation(parts, progress, float(metrics["rollout/truncated/share"]))
    if progress.skipped_in_a_row >= recipe.max_skipped_steps:
        raise TrainingStopped(
            f"{progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient, or nothing to learn on (losses "
            f"{[round(x, 4) for x in update.losses]}, gradient norm {update.grad_norm}); the last is step {step}. "
            f"Lower learning_rate ({recipe.learning_rate}), or look at {parts.folder.samples}"
        )


def _compared(parts: Parts, written: Rollouts) -> dict[str, float]:
    """How far the engine's log-probabilities are from the student's own. Too far, the run stops: it would learn from texts
    of another model, with a loss that looks right."""
    found, most = logprob_difference(parts.method, written), parts.engine.max_logprob_difference
    for difference in found.values():
        if not difference <= most:
            raise TrainingStopped(
                f"the log-probabilities of the sampled tokens differ by {difference:.3g} nats on average between the rollout "
                f"engine and the student, more than rollout.engine.max_logprob_difference={most:g}: the student's weights did "
                "not reach the engine, or it computes with another precision or another model"
            )
    return found


def _extrapolate(parts: Parts, step: int, clock: Clock) -> dict[str, float]:
    """Go further along the last updates, if that helps; the search's part of the step's line."""
    extrapolation = parts.extrapolation
    if extrapolation is None:
        return {}
    with clock.section("extrapolation"):
        found = extrapolation.after_update(step, lambda: validate(parts, extrapolation.config, step))
    if found is None:
        return {}
    if parts.ranks.is_main:
        append_jsonl(parts.folder.searches, found)
    return {"extrapolation/factor/last": found["accepted"], "tokens/extrapolation/sum": found["tokens"]}


def _log(parts: Parts, progress: Progress, metrics: dict[str, float], clock: Clock, written: Rollouts) -> None:
    seconds = clock.seconds()
    of_ranks = parts.ranks.all_gather(list(seconds.values())).tolist()
    if not parts.ranks.is_main:
        return
    several = {f"rank_{rank}": row for rank, row in enumerate(of_ranks)} if len(of_ranks) > 1 else {}
    row = metrics | {
        "train/skipped_steps/total": progress.skipped_steps,
        "tokens/generated/total": progress.generated_tokens,
        **{
            f"time/{name}_s/{whose}": round(s, 4)
            for whose, row in ({"sum": of_ranks[0]} | several).items()
            for name, s in zip(seconds, row, strict=True)
        },
        "training_seconds/total": round(progress.seconds, 3),
        "memory/peak_gib/max": round(peak_memory_gib(parts.ranks.device), 3),
    }
    append_jsonl(parts.folder.metrics, {"step": progress.step} | row)
    parts.accelerator.log(row, step=progress.step)
    for sample in some_samples(parts.method, written):
        append_jsonl(parts.folder.samples, {"step": progress.step} | sample)


def _warn_of_truncation(parts: Parts, progress: Progress, share: float) -> None:
    rollout = parts.recipe.rollout
    meant = rollout.length_at(progress.step) < rollout.max_completion_length
    if share <= TRUNCATED_ALARM or progress.warned_of_truncation or meant:
        return
    progress.warned_of_truncation = True
    if parts.ranks.is_main:
        cut = f"{share:.0%} of the completions of step {progress.step} were cut"
        console.print(
            f"{cut} at {advice_on_cuts(parts.method.student.lm, rollout.max_completion_length)}", style="yellow"
        )


def _evaluate(parts: Parts, progress: Progress, stop: Callable[[], None]) -> tuple[Evaluation, ...]:
    """Every benchmark at this step, unless a resumed run finds it done."""
    start, folder = time.perf_counter(), parts.folder
    facts = {
        "step": progress.step,
        "training_seconds": round(progress.seconds, 3),
        "generated_tokens": progress.generated_tokens,
    }
    evaluations = Evaluator(
        config=parts.recipe.evaluation,
        benchmarks=parts.benchmarks,
        engine=parts.engine,
        tokenizer=parts.method.student.lm.tokenizer,
        verifier=parts.verifier,
        ranks=parts.ranks,
        before_batch=stop,
    ).run(folder.evaluations, folder.path / "evaluations" / f"step-{progress.step:06d}", facts)
    progress.evaluation_seconds += time.perf_counter() - start
    if parts.ranks.is_main:
        parts.accelerator.log({f"eval/{e.benchmark}/avg_at_k": e.avg_at_k for e in evaluations}, step=progress.step)
    return evaluations


def _start(parts: Parts) -> Progress:
    """Create the folder, or go back to the checkpoint that the recipe asks for."""
    recipe, folder, ranks, student = parts.recipe, parts.folder, parts.ranks, parts.method.student
    facts = {"stop_ids": student.lm.stop_ids, "prompts": parts.prompts.digest(recipe.seed)}
    ranks.on_main(lambda: folder.create(recipe, facts, {o.name: o.summary() for o in student.objectives}))
    progress, logs, asked = Progress(), dict[str, int](), recipe.resume_from_checkpoint
    if asked is not None:
        found = whole_checkpoint(folder.checkpoints, asked, ranks)
        if found is not None:
            stored = load_checkpoint(found, student, ranks, _tensors(parts))
            progress, logs = Progress(**stored["progress"]), stored["logs"]
            if ranks.is_main:
                console.print(f"{folder.path}: going on after step {progress.step}.")
            if ranks.is_main and stored["processes"] != ranks.size:
                console.print(
                    f"The checkpoint is of {stored['processes']} processes, this run has {ranks.size}: updates are the same but for "
                    "what they draw themselves (LoRA dropout, redrawn tokens).",
                    style="yellow",
                )

        def forget() -> None:
            kept = folder.logs_until(progress.step, logs)
            # checkpoints first: killed in between, the run goes on from the step whose lines it has
            forget_after(folder.checkpoints, progress.step)
            for file, size in kept.items():
                os.truncate(file, size)

        ranks.on_main(forget)
    if recipe.report_to:
        parts.accelerator.init_trackers("oprd", config={"recipe": recipe_to_yaml(recipe)})
    ranks.wait()
    return progress
