"""Line charts as SVG, small enough to be read in a diff."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH, HEIGHT, GAP = 300, 200, 56
STYLE = "<style>text { font: 12px sans-serif; fill: #555 }</style>"
Line = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One box: x from 0 to the largest there is, y from `low` to `high`."""

    title: str
    x_label: str
    lines: Mapping[str, Line]
    colours: Mapping[str, str]
    low: float
    high: float
    names_at: Literal["top", "bottom"] = "bottom"

    def svg(self, x0: float, y0: float) -> list[str]:
        """At this place, its upper left corner."""
        most = max(x[-1] for x, _ in self.lines.values())

        def y_of(value: float) -> float:
            return y0 + HEIGHT * (1 - (value - self.low) / (self.high - self.low))

        parts = [f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>']
        parts += [
            f'<text x="{x0 - 6}" y="{y_of(value) + 4:.0f}" text-anchor="end">{value}</text>'
            for value in (self.low, self.high)
        ]
        parts.append(f'<text x="{x0 + WIDTH}" y="{y0 + HEIGHT + 15}" text-anchor="end">{most:.0f}</text>')
        parts.append(f'<text x="{x0}" y="{y0 + HEIGHT + 15}">{self.x_label}</text>')
        parts.append(f'<text x="{x0}" y="{y0 - 6}" font-weight="bold">{self.title}</text>')
        for i, (name, (x, y)) in enumerate(self.lines.items()):
            points = " ".join(f"{x0 + WIDTH * a / most:.1f},{y_of(b):.1f}" for a, b in zip(x, y, strict=True))
            colour = self.colours[name]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
            place = y0 + HEIGHT - 8 - 15 * i if self.names_at == "bottom" else y0 + 18 + 15 * i
            parts.append(
                f'<text x="{x0 + WIDTH - 8}" y="{place}" text-anchor="end" style="fill: {colour}">{name}</text>'
            )
        return parts


def write_charts(rows: Sequence[Sequence[Chart]], out: Path) -> None:
    """The charts row by row."""
    parts = [
        part
        for i, row in enumerate(rows)
        for j, chart in enumerate(row)
        for part in chart.svg(GAP + j * (WIDTH + GAP), 30 + i * (HEIGHT + GAP))
    ]
    size = f"{GAP + max(map(len, rows)) * (WIDTH + GAP)} {30 + len(rows) * (HEIGHT + GAP)}"
    text = "\n".join(parts)
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{STYLE}<rect width="100%" height="100%" '
        f'fill="white"/>\n{text}\n</svg>\n',
        encoding="utf-8",
    )
