"""Models as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from slipstream_client.cli import terminal
from slipstream_client.models import Model, Progress

COLOURS = {
    "ready": "green",
    "failed": "red",
    "loading": "cyan",
    "downloading": "cyan",
    "creating": "cyan",
    "restarting": "yellow",
    "unloading": "yellow",
}


def model_table(models: Iterable[Model], default_model: str = "") -> Table:
    """One row for each model; a star marks the default one."""
    rows = terminal.table("model", "state", "size", "context", "memory", "on", right=("size", "context", "memory"))
    for model in models:
        star = " [yellow]★[/]" if model.name == default_model else ""
        rows.add_row(
            f"[bold]{escape(model.id)}[/]{star}",
            state_of(model),
            terminal.in_short(model.parameter_count) if model.parameter_count else "",
            str(model.context_tokens or ""),
            terminal.in_bytes(model.memory_bytes) if model.memory_bytes else "",
            " ".join(filter(None, [" ".join(model.devices), model.data_type])),
        )
    return rows


def state_of(model: Model) -> str:
    """The state in colour, with what is known about it."""
    colour = COLOURS.get(model.state, "dim")
    more = model.note or (progress_in_words(model.progress) if model.progress else "")
    return f"[{colour}]{model.state or 'unknown'}[/]" + (f" [dim]{escape(more)}[/]" if more else "")


def progress_in_words(progress: Progress) -> str:
    """``loading weights 43%``, or with counts where the total is not known."""
    done = progress.completed_count
    if progress.fraction is not None:
        amount = f"{progress.fraction:.0%}"
    else:
        amount = terminal.in_bytes(done) if progress.unit == "bytes" else f"{done} {progress.unit}" if done else ""
    return " ".join(filter(None, [progress.stage, amount]))
