"""The lines of a bench as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """One row a comparison; a ratio above 1 is in our favour."""
    table = Table(title=f"engine bench, {lines[0]['dtype']}, {lines[0]['cores']} cores" if lines else "engine bench")
    for name in ("workload", "side", "versus", "measure"):
        table.add_column(name, overflow="fold")
    for name in ("ours", "theirs", "ratio", "spread", "runs", "same"):
        table.add_column(name, justify="right")
    for line in lines:
        measure = line["measure"]
        table.add_row(
            line["workload"], line["side"], line["versus"], measure,
            f"{line['ours'][measure]:.1f}", f"{line['theirs'][measure]:.1f}",
            f"{line['ratio_median']:.2f}", f"{line['ratio_min']:.2f} to {line['ratio_max']:.2f}",
            str(line["runs"]), f"{line['same_answers']:.0%}",
        )  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)
