"""One self-contained HTML page from run folders: a table, curves, samples, recipes. Reads files only."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from oprd.errors import RunFolderError
from oprd.files import read_jsonl, write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colour-blind safe set."""
DASHES = ("solid", "dash", "dot", "dashdot")
COSTS = {"step": "step", "training_seconds": "seconds of training", "generated_tokens": "tokens the student wrote"}
"""What accuracy is drawn against, by its key in evaluations.jsonl. EffOPD's searches count."""
BY_BLOCK = re.compile(r"(.+)_block_(\d+)(.*)")
"""Metrics with one number per transformer block, drawn against the block."""

Row = Mapping[str, Any]
Figures = list[dict[str, Any]]
"""Plotly's `data` and `layout`. The page adds to the layout what all figures have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run folder holds so far."""

    name: str
    line: Mapping[str, str]
    """Colour and dash of the run's curves, the same in all figures."""
    recipe: Row
    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    samples: Sequence[Row]
    searches: Sequence[Row]
    """EffOPD's."""
    bridge: Mapping[str, Row]
    """Held-out numbers of OPRD-Bridge's fit, by the student's block; empty without a bridge."""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path. Raises RunFolderError for a folder that is not a run.

    A run in progress is shown as far as it has come.
    """
    names, read = [run.resolve().name for run in runs], []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        label = name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        line = {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        read.append(_read(run, label, line))
    groups = {"Accuracy": [figure for cost in COSTS for figure in _accuracy(read, cost)], **_metrics(read)}
    groups |= {"Searches": _searches(read), "Bridge": _bridges(read)}
    page = Environment(loader=PackageLoader("oprd.report", "."), autoescape=True).get_template("report.html.j2")
    text = page.render(
        runs=[
            (run, {row["benchmark"]: row for row in run.evaluations}, yaml.safe_dump(run.recipe, sort_keys=False))
            for run in read
        ],
        groups={name: figures for name, figures in groups.items() if figures},
        plotly=get_plotlyjs(),
    )
    write_atomically(out, text)
    return out


def _read(folder: Path, name: str, line: Mapping[str, str]) -> RunFiles:
    if not (folder / "recipe.yaml").is_file():
        raise RunFolderError(f"{folder} is not a run folder: it has no recipe.yaml. Give the output_dir of a run")
    fits = folder / "objectives.json"
    return RunFiles(
        name=name,
        line=line,
        recipe=yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
        metrics=read_jsonl(folder / "metrics.jsonl"),
        evaluations=read_jsonl(folder / "evaluations.jsonl"),
        samples=read_jsonl(folder / "samples.jsonl"),
        searches=read_jsonl(folder / "searches.jsonl"),
        bridge=next(iter(json.loads(fits.read_text(encoding="utf-8")).values())) if fits.is_file() else {},
    )


def _metrics(runs: Sequence[RunFiles]) -> dict[str, Figures]:
    """A figure for every key of metrics.jsonl, by the key's first part; keys with a block share one figure."""
    groups: dict[str, dict[str, Figures]] = {}
    for key in dict.fromkeys(key for run in runs for row in run.metrics for key in row if key != "step"):
        block = BY_BLOCK.fullmatch(key)
        title = f"{block[1]}{block[3]} by block" if block else key
        group = groups.setdefault(key.split("/")[0], {})
        if title not in group:
            group[title] = _by_block(runs, title, block) if block else _curve(runs, key)
    return {name: [figure for figures in group.values() for figure in figures] for name, group in groups.items()}


def _curve(runs: Sequence[RunFiles], key: str) -> Figures:
    """One metric against the step; on a logarithmic axis if it spans more than two powers of ten."""
    points = [[(row["step"], row[key]) for row in run.metrics if key in row] for run in runs]
    values = [value for rows in points for _, value in rows]
    log = min(values) > 0 and max(values) > 100 * min(values)
    curves = [_trace(run, rows, mode="lines") for run, rows in zip(runs, points, strict=True)]
    return _figure(key, curves, "step", "", log=log)


def _by_block(runs: Sequence[RunFiles], title: str, key: re.Match[str]) -> Figures:
    """A metric against the block, at the first and the last step that have it; `key` is that of one block."""
    curves, like = [], re.compile(f"{re.escape(key[1])}_block_(\\d+){re.escape(key[3])}")
    for run in runs:
        rows = [row for row in run.metrics if any(map(like.fullmatch, row))]
        for row, dash in zip(rows[:: max(1, len(rows) - 1)], ("dot", "solid"), strict=False):
            points = sorted((int(found[1]), row[found[0]]) for found in map(like.fullmatch, row) if found)
            curves.append(_trace(run, points, f": step {row['step']}", line={**run.line, "dash": dash}))
    return _figure(title, curves, "block", "")


def _accuracy(runs: Sequence[RunFiles], cost: str) -> Figures:
    curves = []
    for run in runs:
        for benchmark in dict.fromkeys(row["benchmark"] for row in run.evaluations):
            rows = [row for row in run.evaluations if row["benchmark"] == benchmark and cost in row]
            above = [row["avg_at_k_high"] - row["avg_at_k"] for row in rows]
            below = [row["avg_at_k"] - row["avg_at_k_low"] for row in rows]
            error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
            points = [(row[cost], row["avg_at_k"]) for row in rows]
            curves.append(_trace(run, points, f": {benchmark}", error_y=error))
    return _figure(f"Accuracy by {COSTS[cost]}", curves, COSTS[cost], "avg@k, 95% interval")


def _searches(runs: Sequence[RunFiles]) -> Figures:
    """The factor that each of EffOPD's searches accepted."""
    curves = [_trace(run, [(row["step"], row["accepted"]) for row in run.searches], mode="markers") for run in runs]
    return _figure("Searches: factor accepted (0: plain update)", curves, "step", "times delta")


def _bridges(runs: Sequence[RunFiles]) -> Figures:
    """Held-out cosine against the rank, with the rank in use marked, and the spectrum it was chosen from."""
    cosines, spectra = [], []
    shown = [run for i, run in enumerate(runs) if run.bridge not in [other.bridge for other in runs[:i]]]
    for i, run in enumerate(shown):
        for j, (block, curves) in enumerate(run.bridge.items()):
            label = f": block {block} to {curves['teacher_block']}, rank {curves['rank']}"
            sizes = [9 if rank == curves["rank"] else 0 for rank in range(1, len(curves["canonical"]) + 1)]
            line = {"color": COLOURS[j % len(COLOURS)], "dash": DASHES[i % len(DASHES)]}
            for traces, key in ((cosines, "cosine"), (spectra, "canonical")):
                traces.append(_trace(run, list(enumerate(curves[key], 1)), label, line=line, marker={"size": sizes}))
    grey = {"color": "grey", "dash": "dot"}
    half = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5, "line": grey}
    return [
        *_figure("Held-out cosine of the projections", cosines, "rank", "mean cosine"),
        *_figure("Held-out canonical correlations", spectra, "direction", "squared correlation", shapes=[half]),
    ]


def _trace(run: RunFiles, points: Sequence[tuple[float, float]], label: str = "", **more: Any) -> dict[str, Any]:
    x, y = [x for x, _ in points], [y for _, y in points]
    return {"x": x, "y": y, "name": run.name + label, "mode": "lines+markers", "line": run.line} | more


def _figure(title: str, curves: Figures, x: str, y: str, *, log: bool = False, **more: Any) -> Figures:
    """One figure with the curves that have points; nothing if there are none."""
    curves = [curve for curve in curves if curve["x"]]
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "type": "log" if log else "linear"}}
    return [{"data": curves, "layout": {"title": {"text": title}, **axes, **more}}] if curves else []
