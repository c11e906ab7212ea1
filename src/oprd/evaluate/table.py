"""Scores as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from oprd.evaluate.run import Evaluation


def evaluation_table(rows: Sequence[Evaluation], names: Sequence[str] | None = None) -> Table:
    """One line per evaluation; `names` replaces the benchmark's name in the first column."""
    table = Table(title=None)
    for column in ("", "avg@k", "95% interval", "best@k", "maj@k", "length", "cut"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(
            names[i] if names else row.benchmark,
            f"{row.avg_at_k:.3f}",
            f"{row.avg_at_k_low:.3f}-{row.avg_at_k_high:.3f}",
            f"{row.best_at_k:.3f}",
            f"{row.maj_at_k:.3f}",
            f"{row.mean_length:.0f}",
            f"{row.truncated_share:.0%}",
        )
    return table
