"""``slipstream doctor``: looks at this machine and says what is wrong and how to mend it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.doctor_machine import check_disk, check_hub, check_memory, check_python, check_torch
from slipstream_client.cli.doctor_services import check_config, check_packages, check_ports
from slipstream_client.cli.findings import Finding, Level

MARKS = {Level.OK: "[green]✓[/]", Level.WARN: "[yellow]![/]", Level.FAIL: "[red]✗[/]"}


def doctor(
    data_dir: Annotated[Path | None, typer.Option(help="Folder that `up` would use.")] = None,
    as_json: terminal.JsonFlag = False,
) -> None:
    """Check Python, packages, device, memory, disk, ports, hub and configuration.

    Exit code 1 where something has failed.
    """
    findings = asyncio.run(_examine(data_dir))
    if as_json:
        for finding in findings:
            terminal.print_json(dataclasses.asdict(finding))
    else:
        for finding in findings:
            _print(finding)
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(1)


async def _examine(data_dir: Path | None) -> list[Finding]:
    """All findings, in the order in which they are shown; what waits for something waits at the same time."""
    with terminal.err.status("looking around …") if terminal.err.is_terminal else contextlib.nullcontext():
        slow = asyncio.gather(asyncio.to_thread(check_torch), asyncio.to_thread(check_hub), check_ports())
        here = [check_python(), *check_packages()]
        room = [check_memory(), check_disk(data_dir)]
        configuration = check_config()
        torch, hub, ports = await slow
    return [*here, torch, *room, *ports, hub, *configuration]


def _print(finding: Finding) -> None:
    terminal.out.print(f"{MARKS[finding.level]} [bold]{finding.name:<13}[/] {escape(finding.text)}")
    if finding.mend:
        terminal.out.print(f"  {'':<13} [dim]→ {escape(finding.mend)}[/]")
