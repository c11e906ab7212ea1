"""One self-contained HTML page from run folders: a table, curves, samples, recipes. Reads files only."""

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from oprd.errors import RunFolderError
from oprd.files import iterate_jsonl, read_json, write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colour-blind safe set."""
DASHES = ("solid", "dash", "dot", "dashdot")
COSTS = {"step": "step", "training_seconds": "seconds of training", "generated_tokens": "tokens the student wrote"}
"""What accuracy is drawn against, by its key in evaluations.jsonl. EffOPD's searches count."""
BY_BLOCK = re.compile(r"(.+)_block_(\d+)(.*)")
"""Metrics with one number per transformer block, drawn against the block."""

MOST_POINTS = 2000
"""Of a curve on the page."""

Row = Mapping[str, Any]
Point = tuple[float, float]
Figures = list[dict[str, Any]]
"""Plotly's `data` and `layout`. The page adds to the layout what all figures have in common."""


@dataclass(slots=True)
class Curve:
    """Points (x, y) with rising x, thinned as they come: of more than MOST_POINTS the lowest and the highest of each stretch."""

    stretch: int = 1
    """Points of which two are kept; 1: all are."""
    first: Point = (0.0, 0.0)
    last: Point = (0.0, 0.0)
    _extremes: list[tuple[Point, Point]] = field(default_factory=list)
    """Lowest and highest of each stretch."""
    _room: int = 0
    """Points until the next stretch."""

    @classmethod
    def of(cls, points: Iterable[Point]) -> "Curve":
        """A curve of these points."""
        curve = cls()
        for point in points:
            curve.add(*point)
        return curve

    def add(self, x: float, y: float) -> None:
        """Add a point on the right."""
        self.last = point = (x, y)
        if self._room:
            low, high = self._extremes[-1]
            self._extremes[-1] = _lower(low, point), _higher(high, point)
        else:
            while len(self._extremes) * min(2, self.stretch) >= MOST_POINTS:
                both = zip(self._extremes[::2], self._extremes[1::2], strict=True)
                self._extremes = [(_lower(a, c), _higher(b, d)) for (a, b), (c, d) in both]
                self.stretch *= 2
            if not self._extremes:
                self.first = point
            self._extremes.append((point, point))
            self._room = self.stretch
        self._room -= 1

    @property
    def points(self) -> list[Point]:
        """What is drawn, from left to right."""
        return [point for pair in self._extremes for point in sorted(set(pair))]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run folder holds so far."""

    name: str
    line: Mapping[str, str]
    """Colour and dash of the run's curves, the same in all figures."""
    recipe: Row
    metrics: Mapping[str, Curve]
    last: Row
    """Of metrics.jsonl; empty before the first."""
    evaluations: Sequence[Row]
    samples: Sequence[Row]
    """The first two and the last two."""
    searches: Curve
    """The factor that each of EffOPD's accepted."""
    bridge: Mapping[str, Row]
    """Held-out numbers of OPRD-Bridge's fit, by the student's block; empty without a bridge."""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path. Raises RunFolderError for a folder that is not a run, or has a damaged file.

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
        thinned=any(curve.stretch > 1 for run in read for curve in run.metrics.values()),
        most_points=MOST_POINTS,
        plotly=get_plotlyjs(),
    )
    write_atomically(out, text)
    return out


def _read(folder: Path, name: str, line: Mapping[str, str]) -> RunFiles:
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"{folder} is not a run folder: it has no run.json. Give the output_dir of a run")
    fits, last = folder / "objectives.json", dict[str, Any]()
    metrics = defaultdict[str, Curve](Curve)
    for last in iterate_jsonl(folder / "metrics.jsonl"):
        step = last["step"]
        for key, value in last.items():
            metrics[key].add(step, value)
    metrics.pop("step", None)
    samples = iterate_jsonl(folder / "samples.jsonl")
    return RunFiles(
        name=name,
        line=line,
        recipe=read_json(folder / "run.json")["recipe"],
        metrics=metrics,
        last=last,
        evaluations=list(iterate_jsonl(folder / "evaluations.jsonl")),
        samples=[*islice(samples, 2), *deque(samples, 2)],
        searches=Curve.of((row["step"], row["accepted"]) for row in iterate_jsonl(folder / "searches.jsonl")),
        bridge=next(iter(read_json(fits).values())) if fits.is_file() else {},
    )


def _metrics(runs: Sequence[RunFiles]) -> dict[str, Figures]:
    """A figure for every key of metrics.jsonl, by the key's first part; keys with a block share one figure."""
    groups: dict[str, dict[str, Figures]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.metrics):
        block = BY_BLOCK.fullmatch(key)
        title = f"{block[1]}{block[3]} by block" if block else key
        group = groups.setdefault(key.split("/")[0], {})
        if title not in group:
            group[title] = _by_block(runs, title, block) if block else _curve(runs, key)
    return {name: [figure for figures in group.values() for figure in figures] for name, group in groups.items()}


def _curve(runs: Sequence[RunFiles], key: str) -> Figures:
    """One metric against the step; on a logarithmic axis if it spans more than two powers of ten."""
    points = [run.metrics[key].points if key in run.metrics else [] for run in runs]
    values = [value for rows in points for _, value in rows]
    log = min(values) > 0 and max(values) > 100 * min(values)
    curves = [_trace(run, rows, mode="lines") for run, rows in zip(runs, points, strict=True)]
    return _figure(key, curves, "step", "", log=log)


def _by_block(runs: Sequence[RunFiles], title: str, key: re.Match[str]) -> Figures:
    """A metric against the block, at the first and the last step that have it; `key` is that of one block."""
    curves, like = [], re.compile(f"{re.escape(key[1])}_block_(\\d+){re.escape(key[3])}")
    for run in runs:
        found = (match for match in map(like.fullmatch, run.metrics) if match)
        blocks = sorted(((int(match[1]), run.metrics[match[0]]) for match in found), key=lambda pair: pair[0])
        ends = {"dot": [curve.first for _, curve in blocks], "solid": [curve.last for _, curve in blocks]}
        for dash, points in ends.items():
            at = [(block, y) for (block, _), (_, y) in zip(blocks, points, strict=True)]
            label = f": step {points[0][0]}" if points else ""
            curves.append(_trace(run, at, label, line={**run.line, "dash": dash}))
    return _figure(title, curves, "block", "")


def _accuracy(runs: Sequence[RunFiles], cost: str) -> Figures:
    curves = []
    for run in runs:
        for benchmark in dict.fromkeys(row["benchmark"] for row in run.evaluations):
            every = [row for row in run.evaluations if row["benchmark"] == benchmark and cost in row]
            kept = Curve.of(enumerate(row["avg_at_k"] for row in every)).points
            rows = [every[int(i)] for i, _ in kept]
            above = [row["avg_at_k_high"] - row["avg_at_k"] for row in rows]
            below = [row["avg_at_k"] - row["avg_at_k_low"] for row in rows]
            error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
            points = [(row[cost], row["avg_at_k"]) for row in rows]
            curves.append(_trace(run, points, f": {benchmark}", error_y=error))
    return _figure(f"Accuracy by {COSTS[cost]}", curves, COSTS[cost], "avg@k, 95% interval")


def _searches(runs: Sequence[RunFiles]) -> Figures:
    """The factor that each of EffOPD's searches accepted."""
    curves = [_trace(run, run.searches.points, mode="markers") for run in runs]
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


def _lower(one: Point, other: Point) -> Point:
    return other if other[1] < one[1] or one[1] != one[1] else one


def _higher(one: Point, other: Point) -> Point:
    return other if other[1] > one[1] or one[1] != one[1] else one
