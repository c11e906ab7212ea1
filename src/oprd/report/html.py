"""One self-contained HTML page from run folders: a table, curves, samples, recipes. Reads files only."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from oprd.errors import RunFolderError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colour-blind safe set."""
SAMPLES = 4
LEGEND_ROW_PX = 20

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run folder holds so far."""

    name: str
    recipe: Mapping[str, Any]
    machine: Mapping[str, Any]
    metrics: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    samples: tuple[Row, ...]
    searches: tuple[Row, ...]
    """Of the extrapolation."""
    updates: Row
    """What `oprd diagnose updates` wrote; empty if it was not run."""
    bridge: Mapping[str, Row]
    """Held-out numbers of OPRD-Bridge's fit by the student's block; empty without a bridge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One curve for each (key, label) of each run."""

    title: str
    y: str
    keys: tuple[str, ...]
    log: bool = False
    """Logarithmic y: runs whose sizes have nothing to do with each other."""


PLOTS = (
    Plot(title="Hidden-state loss", y="squared units of the state", keys=("train/oprd/mean",)),
    Plot(title="Bridge loss", y="mean squared difference", keys=("train/oprd_bridge/mean",)),
    Plot(title="Divergence", y="nats per token", keys=("train/reverse_kl/mean", "train/forward_kl/mean", "train/jsd/mean")),
    Plot(title="OmniOPD loss", y="nats per completion", keys=("train/omni_opd/mean",)),
    Plot(title="Negative log-likelihood of the teacher's text", y="nats per token", keys=("train/nll/mean",)),
    Plot(title="Gradient norm before clipping", y="norm", keys=("train/grad_norm",), log=True),
    Plot(title="Learning rate", y="rate", keys=("train/learning_rate",)),
    Plot(title="Completion length", y="tokens", keys=("rollout/length/mean",)),
    Plot(title="Truncated and empty completions", y="share", keys=("rollout/truncated/share", "rollout/empty/share")),
    Plot(title="Top-16 overlap of student and teacher", y="share", keys=("health/top_16_overlap/mean",)),
    Plot(title="Entropy", y="nats", keys=("health/student_entropy/mean", "health/teacher_entropy/mean")),
    Plot(title="Sampled reverse KL", y="nats per token", keys=("health/sampled_reverse_kl/mean",)),
    Plot(title="Seconds a step", y="seconds", keys=("time/rollout_s", "time/teacher_s", "time/update_s", "time/extrapolation_s", "time/other_s")),
)  # fmt: skip


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path. Raises RunFolderError for a folder that is not a run.

    A run that is still going is shown as far as it has come.
    """
    read = _distinct([_read(Path(run)) for run in runs])
    figures = [
        *(_accuracy(read, against) for against in COSTS),
        *(_curves(plot, read) for plot in PLOTS),
        _cosines(read),
        _searches(read),
        *_bridges(read),
    ]
    figures += [figure for run in read for figure in (*_updates(run), _far_early(run))]
    page = Environment(loader=PackageLoader("oprd.report", "."), autoescape=True).get_template("report.html.j2")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        page.render(
            rows=[_summary(run) for run in read],
            figures=[json.loads(str(figure.to_json())) for figure in figures if figure is not None],
            runs=[
                {"name": run.name, "recipe": yaml.safe_dump(dict(run.recipe), sort_keys=False), "samples": _some(run)}
                for run in read
            ],
            plotly=get_plotlyjs(),
        ),
        encoding="utf-8",
    )
    return out


def _read(folder: Path) -> RunFiles:
    if not (folder / "recipe.yaml").is_file():
        raise RunFolderError(f"{folder} is not a run folder: it has no recipe.yaml. Give the output_dir of a run")
    machine, updates, bridge = folder / "run.json", folder / "updates.json", folder / "bridge.json"
    return RunFiles(
        name=folder.resolve().name,
        recipe=yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
        machine=json.loads(machine.read_text(encoding="utf-8")) if machine.is_file() else {},
        metrics=_lines(folder / "metrics.jsonl"),
        evaluations=_lines(folder / "evaluations.jsonl"),
        samples=_lines(folder / "samples.jsonl"),
        searches=_lines(folder / "searches.jsonl"),
        updates=json.loads(updates.read_text(encoding="utf-8")) if updates.is_file() else {},
        bridge=json.loads(bridge.read_text(encoding="utf-8")) if bridge.is_file() else {},
    )


def _lines(path: Path) -> tuple[Row, ...]:
    """The rows of a file that may be missing, or end in a line that is just being written."""
    if not path.is_file():
        return ()
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return tuple(rows)


def _distinct(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Runs of the same name get a number."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})")
        for i, run in enumerate(runs)
    ]


def _summary(run: RunFiles) -> dict[str, str]:
    """The run's line in the table, as text."""
    last: Row = run.metrics[-1] if run.metrics else {}
    teacher = run.recipe.get("teacher", {})
    stages = run.recipe.get("stages") or [run.recipe]
    steps = sum(stage.get("max_steps", 0) for stage in stages)
    return {
        "run": run.name,
        "student": _short(run.recipe.get("student", {}).get("model", "?")),
        "teacher": _short(teacher.get("model", teacher.get("type", "?"))),
        "objective": ", then ".join(_objective(stage.get("objective", {})) for stage in stages),
        "steps": f"{last.get('step', 0)} of {steps}",
        "scores": "; ".join(_score(row) for row in _last_evaluations(run)) or "none yet",
        "minutes": f"{last['training_seconds/total'] / 60:.1f}" if "training_seconds/total" in last else "–",
        "peak memory, GiB": f"{last['memory/peak_gib']:.2f}" if "memory/peak_gib" in last else "–",
        "truncated": f"{last['rollout/truncated/share']:.0%}" if "rollout/truncated/share" in last else "–",
        "skipped steps": str(last.get("train/skipped_steps/total", "–")),
    }


def _objective(config: Mapping[str, Any]) -> str:
    terms = config.get("terms") or [config]
    return " + ".join(
        " ".join(str(term[k]) for k in ("type", "divergence", "estimator", "rank") if k in term) for term in terms
    )


def _score(row: Row) -> str:
    interval = f"{row['avg_at_k_low']:.3f} to {row['avg_at_k_high']:.3f}"
    return f"{row['benchmark']} avg@{row['samples']} {row['avg_at_k']:.3f} ({interval})"


def _last_evaluations(run: RunFiles) -> list[Row]:
    return list({row["benchmark"]: row for row in run.evaluations}.values())


def _short(model: str) -> str:
    return "/".join(Path(model).parts[-2:])


def _curves(plot: Plot, runs: Sequence[RunFiles]) -> go.Figure | None:
    figure = go.Figure()
    for i, run in enumerate(runs):
        keys = _present(plot, run)
        for j, key in enumerate(keys):
            points = [(row["step"], row[key]) for row in run.metrics if key in row]
            label = (
                run.name
                if len(plot.keys) == 1 and len(keys) == 1
                else f"{run.name}: {key.split('/')[1].removesuffix('_s')}"
            )
            figure.add_scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                name=label,
                mode="lines",
                line={"color": COLOURS[i % len(COLOURS)], "dash": ("solid", "dash", "dot", "dashdot")[j % 4]},
            )
    return _titled(figure, plot.title, "step", plot.y, log=plot.log)


COSTS = {"step": "step", "training_seconds": "seconds of training", "generated_tokens": "tokens the student wrote"}
"""What accuracy is held against, searches of the extrapolation included."""


def _accuracy(runs: Sequence[RunFiles], against: str) -> go.Figure | None:
    figure = go.Figure()
    for i, run in enumerate(runs):
        for benchmark in dict.fromkeys(row["benchmark"] for row in run.evaluations):
            rows = [row for row in run.evaluations if row["benchmark"] == benchmark and against in row]
            if not rows:
                continue
            figure.add_scatter(
                x=[row[against] for row in rows],
                y=[row["avg_at_k"] for row in rows],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [row["avg_at_k_high"] - row["avg_at_k"] for row in rows],
                    "arrayminus": [row["avg_at_k"] - row["avg_at_k_low"] for row in rows],
                },
                name=f"{run.name}: {benchmark}",
                mode="lines+markers",
                line={"color": COLOURS[i % len(COLOURS)]},
            )
    return _titled(figure, f"Accuracy by {COSTS[against]}", COSTS[against], "avg@k, 95% interval")


def _cosines(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Cosine of student and teacher states by block, at the first and the last logged step."""
    figure = go.Figure()
    for i, run in enumerate(runs):
        rows = [row for row in run.metrics if "health/cosine_block_01/mean" in row]
        for row, dash in zip((rows[0], rows[-1]) if rows else (), ("dot", "solid"), strict=True) if rows else ():
            cosines = [value for key, value in row.items() if key.startswith("health/cosine_block_")]
            figure.add_scatter(
                x=list(range(1, len(cosines) + 1)),
                y=cosines,
                name=f"{run.name}: step {row['step']}",
                mode="lines+markers",
                line={"color": COLOURS[i % len(COLOURS)], "dash": dash},
            )
    return _titled(figure, "Cosine of student and teacher states", "block", "cosine")


def _present(plot: Plot, run: RunFiles) -> list[str]:
    """The plot's keys that the run has; terms of a mixture that are of one kind have numbered ones."""
    found = dict.fromkeys(key for row in run.metrics for key in row)
    return [
        key for wanted in plot.keys for key in found if key == wanted or re.sub(r"_\d+(?=/mean$)", "", key) == wanted
    ]


def _searches(runs: Sequence[RunFiles]) -> go.Figure | None:
    """How far each search of the extrapolation went."""
    figure = go.Figure()
    for i, run in enumerate(run for run in runs if run.searches):
        figure.add_scatter(
            x=[row["step"] for row in run.searches],
            y=[row["accepted"] for row in run.searches],
            name=run.name,
            mode="markers",
            marker={"color": COLOURS[i % len(COLOURS)]},
        )
    return _titled(figure, "Extrapolation: factor accepted (0: plain update)", "step", "times delta")


UPDATE_PLOTS = (
    ("relative_norm", "Update by matrix kind", "norm of W_t - W_0 over that of W_0"),
    ("cosine", "Update against the last checkpoint's", "cosine"),
    ("top_energy", "Energy of the update in its top {rank} directions", "share"),
    ("subspace_cosine", "Top {rank} directions against the last checkpoint's", "cosine"),
)


def _updates(run: RunFiles) -> list[go.Figure | None]:
    """By kind of matrix, mean over blocks, against the step; and the last step's norm against the block."""
    rows: list[Row] = run.updates.get("matrices", [])
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    figures = []
    for key, title, unit in UPDATE_PLOTS:
        figure = go.Figure()
        for i, kind in enumerate(kinds):
            means = [_mean([row[key] for row in rows if row["kind"] == kind and row["step"] == step]) for step in steps]
            figure.add_scatter(x=steps, y=means, name=kind, mode="lines+markers", line=_line(i))
        figures.append(_titled(figure, f"{run.name}: {title.format(rank=run.updates.get('rank'))}", "step", unit))
    figure = go.Figure()
    for i, kind in enumerate(kinds):
        last = [row for row in rows if row["kind"] == kind and row["step"] == steps[-1]]
        figure.add_scatter(
            x=[row["block"] for row in last],
            y=[row["norm"] for row in last],
            name=kind,
            mode="lines+markers",
            line=_line(i),
        )
    return [*figures, _titled(figure, f"{run.name}: norm of the final update by depth", "block", "norm")]


def _far_early(run: RunFiles) -> go.Figure | None:
    """Accuracy before, at the early checkpoint, of that one rescaled to the final norm, and at the end."""
    figure = go.Figure()
    for i, row in enumerate(run.updates.get("far_early", [])):
        scores = {name: row[name] for name in ("before", "early")}
        scores |= {f"at {share:g}": score for share, score in sorted(row.get("along", ()))}
        scores |= {name: row[name] for name in ("rescaled", "final")}
        figure.add_bar(
            x=list(scores), y=list(scores.values()), name=row["benchmark"], marker={"color": COLOURS[i % len(COLOURS)]}
        )
    rows = run.updates.get("far_early", [])
    steps = (rows[0]["early_step"], rows[0].get("final_step", "?")) if rows else (0, 0)
    return _titled(
        figure,
        f"{run.name}: go far early, from step {steps[0]} of {steps[1]}",
        "weights (at a share of the final norm)",
        "share correct",
    )


def _line(i: int) -> dict[str, str]:
    return {"color": COLOURS[i % len(COLOURS)], "dash": ("solid", "dash", "dot")[i // len(COLOURS) % 3]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bridges(runs: Sequence[RunFiles]) -> list[go.Figure | None]:
    """Rank against held-out cosine, with the rank that was used, and the spectrum it was chosen from."""
    cosine, spectrum = go.Figure(), go.Figure()
    shown = [run for i, run in enumerate(runs) if run.bridge and run.bridge not in [r.bridge for r in runs[:i]]]
    for run, dash in zip(shown, ("solid", "dash", "dot", "dashdot") * len(shown), strict=False):
        for j, (block, told) in enumerate(run.bridge.items()):
            line = {"color": COLOURS[j % len(COLOURS)], "dash": dash}
            name = f"{run.name}: block {block} to {told['teacher_block']}"
            ranks = list(range(1, len(told["canonical"]) + 1))
            used = told["rank"]
            sizes = [9 if rank == used else 0 for rank in ranks]
            marked = {"mode": "lines+markers", "marker": {"size": sizes}, "line": line, "name": f"{name}, rank {used}"}
            cosine.add_scatter(x=ranks[: len(told["cosine"])], y=told["cosine"], **marked)
            spectrum.add_scatter(x=ranks, y=told["canonical"], **marked)
    if spectrum.data:
        spectrum.add_hline(y=0.5, line={"dash": "dot", "color": "grey"})
    return [
        _titled(cosine, "Bridge: held-out cosine of the projections", "rank", "mean cosine"),
        _titled(spectrum, "Bridge: held-out canonical correlations", "direction", "squared correlation"),
    ]


def _titled(figure: go.Figure, title: str, x: str, y: str, *, log: bool = False) -> go.Figure | None:
    curves = tuple(figure.data)
    if not curves:
        return None
    legend_rows = -(-len(curves) // 2)
    return figure.update_layout(
        template="none",
        title={"text": title, "x": 0.02, "font": {"size": 15}},
        xaxis={"title": x},
        yaxis={"title": y, "automargin": True, "type": "log" if log else "linear"},
        height=360 + LEGEND_ROW_PX * legend_rows,
        margin={"l": 60, "r": 16, "t": 44, "b": 70 + LEGEND_ROW_PX * legend_rows},
        legend={"orientation": "h", "yanchor": "top", "y": -0.25},
        showlegend=True,
    )


def _some(run: RunFiles) -> list[Row]:
    """Completions from the beginning and the end of the run."""
    if len(run.samples) <= SAMPLES:
        return list(run.samples)
    return [*run.samples[: SAMPLES // 2], *run.samples[-SAMPLES // 2 :]]
