"""What a step leaves behind: its line in metrics.jsonl, sample completions, the note on the bar."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from oprd.data.chat import decode
from oprd.objectives.base import Objective
from oprd.train.build import Run
from oprd.train.health import Health, health_from_sums, health_readings, health_sample, measure
from oprd.train.processes import gather
from oprd.train.update import Update, student_batch
from oprd.types import HiddenTargets, Rollouts, Tally

SAMPLES_PER_STEP = 2


def step_metrics(run: Run, update: Update, health: Health | None, rollouts: Rollouts) -> dict[str, float]:
    """The step's line but for what depends on the machine: equal bit for bit when a run is repeated on one process."""
    lengths = rollouts.lengths
    empty = sum(length == 0 or (length == 1 and done) for length, done in zip(lengths, rollouts.finished, strict=True))
    mine = [len(rollouts), sum(lengths), sum(not done for done in rollouts.finished), empty]
    completions, tokens, truncated, empties = gather(run, list(map(float, mine))).sum(0).tolist()
    tallies = (*run.teacher.tallies(), *(tally for objective in run.stage.objectives for tally in objective.tallies()))
    told = gather(run, [x for tally in tallies for x in (tally.total, tally.of or 0.0)]).sum(0).tolist()
    names = term_names(run.stage.objectives)
    total = sum(o.coefficient * loss for o, loss in zip(run.stage.objectives, update.losses, strict=True))
    return {
        "train/loss/mean": total,
        **{f"train/{name}/mean": loss for name, loss in zip(names, update.losses, strict=True)},
        "train/grad_norm": update.grad_norm,
        "tokens/generated/sum": int(tokens) if rollouts.sampled else 0,
        "tokens/supervised/sum": max(update.supervised),
        "rollout/length/mean": tokens / completions,
        "rollout/truncated/share": truncated / completions,
        "rollout/empty/share": empties / completions,
        **add_up(tallies, told[::2], told[1::2]),
        **(health.metrics() if health is not None else {}),
    }


def add_up(tallies: Sequence[Tally], totals: Sequence[float], parts: Sequence[float]) -> dict[str, float]:
    """The tallies by name, equal names (of several teachers) added up; a share of nothing is left out."""
    sums: dict[str, tuple[float, float]] = {}
    for tally, total, of in zip(tallies, totals, parts, strict=True):
        total_before, of_before = sums.get(tally.name, (0.0, 0.0))
        sums[tally.name] = total_before + total, of_before + of
    plain = {tally.name for tally in tallies if tally.of is None}
    return {name: total if name in plain else total / of for name, (total, of) in sums.items() if name in plain or of}


def term_names(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The objectives' names, numbered where a mixture has two of a kind."""
    names = [objective.name for objective in objectives]
    return tuple(f"{n}_{names[: i + 1].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names))


def measure_health(run: Run, rollouts: Rollouts) -> Health | None:
    """The health numbers on a few tokens of these rollouts, over all processes; None without a token."""
    sample = health_sample(rollouts, run.recipe.health_tokens)
    readings = health_readings(run.lm.num_blocks)
    shared = run.teacher.comparable(sample, readings)
    targets = run.teacher.targets(sample, shared, head=True) if shared else None
    assert targets is None or isinstance(targets, HiddenTargets)
    run.stage.model.eval()
    sums = run.read(student_batch(run, sample), readings, True, partial(measure, teacher=targets))
    return health_from_sums(gather(run, sums.tolist()).sum(0))


def some_samples(run: Run, rollouts: Rollouts) -> list[dict[str, Any]]:
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


def progress_note(objectives: Sequence[Objective], update: Update, health: Health | None) -> str:
    """What stands beside the bar."""
    losses = " ".join(f"{n} {x:.4f}" for n, x in zip(term_names(objectives), update.losses, strict=True))
    return (
        losses
        + (f" overlap {health.agreement.overlap:.2f}" if health is not None and health.agreement is not None else "")
        + ("" if update.finite else " SKIPPED")
    )
