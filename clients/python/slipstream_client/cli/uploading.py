"""Sending files with a bar, and waiting until a dataset's rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from slipstream_client.cli import terminal
from slipstream_client.cli.dataset_view import print_errors, state_of
from slipstream_client.client import SlipstreamClient
from slipstream_client.datasets import Dataset
from slipstream_client.models import Progress
from slipstream_client.transfers import OnProgress


@contextmanager
def transfer_bar() -> Iterator[OnProgress]:
    """A bar on stderr while files travel; nothing where that is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Bar(*columns, console=terminal.err, transient=True, disable=not terminal.err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.total_count)
            bar.update(tasks[progress.stage], completed=progress.completed_count)

        yield report


async def upload_dataset(client: SlipstreamClient, files: Mapping[str, Path], **options: Any) -> Dataset:
    """Send the files, and wait until every row is read."""
    with transfer_bar() as report:
        dataset = await client.datasets.upload(dict(files), on_progress=report, **options)
    if not dataset.name:
        return dataset
    with terminal.err.status(f"reading the rows of {dataset.id}"):
        return await client.datasets.wait(dataset.name)


def say_uploaded(dataset: Dataset) -> None:
    """What an upload came to; what is wrong with the rows goes to stderr's side of the screen too."""
    mark = {"ready": "[green]✓[/]", "invalid": "[yellow]![/]"}.get(dataset.state, "[red]✗[/]")
    name = f"[bold]{dataset.id}[/] " if dataset.name else ""
    rows = f"{dataset.row_count} rows, {dataset.format.replace('_', ' ')}" if dataset.row_count else ""
    terminal.out.print(f"{mark} {name}{state_of(dataset)} [dim]{rows}[/]")
    print_errors(dataset)


def require_usable(dataset: Dataset, *, skip_invalid_rows: bool) -> None:
    """End the command where no job could train on the dataset."""
    if dataset.state == "ready" or (dataset.state == "invalid" and skip_invalid_rows):
        return
    if dataset.state == "invalid":
        terminal.note("mend these rows, or leave them out with --skip-invalid-rows")
    raise typer.Exit(1)
