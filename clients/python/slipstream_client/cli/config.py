"""``slipstream config``: what the services of this machine would run with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.server_side import server

app = typer.Typer(no_args_is_help=True, help="The services' configuration.")


@app.callback()
def _noun() -> None:
    """The services' configuration."""


@app.command("check")
def check(
    file: Annotated[
        Path | None, typer.Option("--config", help="File to check; unset: SLIPSTREAM_CONFIG, then slipstream.toml.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show defaults, too.")] = False,
    as_json: terminal.JsonFlag = False,
) -> None:
    """Check slipstream.toml and the environment; show every value that is not a default, and where it comes from."""
    backend = server("config check")
    try:
        values = backend.check_config(file)
    except backend.ConfigError as error:
        _refuse(error.problems, as_json)
    chosen = [row for row in values if everything or row[2] != "default"]
    if as_json:
        names = ("key", "value", "source", "allowed", "about")
        settings = [dict(zip(names, row, strict=True)) for row in chosen]
        terminal.print_json({"ok": True, "settings": settings})
        return
    rows = terminal.table("key", "value", "from", "")
    for key, value, source, allowed, about in chosen:
        more = f" ({allowed})" if allowed != "any value" else ""
        rows.add_row(f"[bold]{key}[/]", escape(value), source, f"[dim]{escape(about + more)}[/]")
    if chosen:
        terminal.plain_table(rows)
    defaults = "" if chosen else ": all defaults (--all shows them)"
    terminal.out.print(f"[green]✓[/] the configuration is good{defaults}")


def _refuse(problems: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        terminal.print_json({"ok": False, "problems": list(problems)})
    else:
        for problem in problems:
            terminal.out.print(f"[red]✗[/] {escape(problem)}")
    raise typer.Exit(1)
