"""Scores as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from oprd.evaluate.run import Evaluation

NARROW = 76
"""Below this many columns only the average and its interval fit without being cut."""


def evaluation_table(rows: Sequence[Evaluation], *, names: Sequence[str] | None = None, width: int = 80) -> Table:
    """One line per evaluation in a terminal of `width` columns; `names` replaces the benchmarks' names."""
    cells = [
        {
            "": names[i] if names else row.benchmark,
            "avg@k": f"{row.avg_at_k:.3f}",
            "95% interval": f"{row.avg_at_k_low:.3f}-{row.avg_at_k_high:.3f}",
            "best@k": f"{row.best_at_k:.3f}",
            "maj@k": f"{row.maj_at_k:.3f}",
            "length": f"{row.mean_length:.0f}",
            "cut": f"{row.truncated_share:.0%}",
        }
        for i, row in enumerate(rows)
    ]
    columns = ["", "avg@k", "95% interval"] + (["best@k", "maj@k", "length", "cut"] if width >= NARROW else [])
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column else "left", overflow="fold", no_wrap=bool(column))
    for cell in cells:
        table.add_row(*(cell[column] for column in columns))
    return table
