"""What the terminal shows: one voice for results, notes and failures.

Colours only where there is a terminal (and NO_COLOR is not set).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from slipstream_client.errors import SlipstreamClientError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON: one object, or JSON Lines for streams.")]


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout; dataclasses become objects."""
    sys.stdout.write(json.dumps(value, default=_plain, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def note(text: str) -> None:
    """Something beside the result, dimmed, on stderr."""
    err.print(Text(text, style="dim"))


def warn(text: str) -> None:
    """Something that went wrong and is being dealt with, on stderr."""
    err.print(f"[bold yellow]![/] {escape(text)}")


def print_failure(error: SlipstreamClientError) -> None:
    """One line: what failed, then reason and request id for whoever has to look further."""
    err.print(f"[bold red]error[/] {escape(str(error))}{_particulars(error)}")
    if hint := _hint(error):
        note(f"      {hint}")


def _particulars(error: SlipstreamClientError) -> str:
    known = {
        "reason": error.reason,
        "error id": error.metadata.get("error_id", ""),
        "retry after": f"{error.retry_after_s:g} s" if error.retry_after_s is not None else "",
        "request": error.request_id if error.reason else "",
    }
    said = ", ".join(f"{name} {value}" for name, value in known.items() if value)
    return f" [dim]({escape(said)})[/]" if said else ""


def _hint(error: SlipstreamClientError) -> str:
    if "does not answer at" in error.message:
        return "start one with `slipstream up`, or point SLIPSTREAM_ADDRESS at one that runs"
    if error.reason == "UNAUTHENTICATED":
        return "give a token with --token-file, SLIPSTREAM_TOKEN or SLIPSTREAM_TOKEN_FILE"
    return ""


def fail(message: str, *, exit_code: int = 1) -> NoReturn:
    """Say why the command cannot go on, and end it."""
    err.print(f"[bold red]error[/] {escape(message)}")
    raise typer.Exit(exit_code)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house's look; the columns named in ``right`` hold numbers."""
    empty = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for column in columns:
        empty.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return empty


def plain_table(rows: Table) -> None:
    """Print a table, as wide as its content where stdout is no terminal (nothing is cut off or wrapped in a pipe)."""
    if out.is_terminal:
        out.print(rows, soft_wrap=False)
    else:
        Console(highlight=False, width=10_000).print(rows, soft_wrap=False)


def is_interactive() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def in_bytes(count: int) -> str:
    """A size for people: 1.5 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def in_short(count: int) -> str:
    """A count for people: 135M."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Label and value (markup), one pair a line; pairs without a value are left out."""
    shown = table("", "")
    shown.show_header = False
    for label, value in rows:
        if value:
            shown.add_row(f"[dim]{label}[/]", value)
    plain_table(shown)


def deleted(name: str, as_json: bool) -> None:
    """Say that something is gone."""
    if as_json:
        print_json({"deleted": name})
    else:
        out.print(f"[green]✓[/] {escape(name)} is deleted")


def age(moment: datetime | None) -> str:
    """How long ago that was: 5 min."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (86_400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
