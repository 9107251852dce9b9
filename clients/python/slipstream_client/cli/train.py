"""``slipstream train``: from a file of examples to a version of an adapter, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.training_flags import TrainingFlags
from slipstream_client.cli.uploading import require_usable, say_uploaded, upload_dataset
from slipstream_client.cli.watching import end_with, follow
from slipstream_client.client import SlipstreamClient
from slipstream_client.datasets import Dataset
from slipstream_client.jobs import TrainingJob

DATASET_PREFIX = "datasets/"


@with_groups
def train(
    data: Annotated[str, typer.Argument(help="File of rows to train on, or datasets/ID of one that was uploaded.")],
    *,
    base: Annotated[str, typer.Option("--base", "-b", help="Model to start from.")],
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Adapter that gets the new version; made if new.")],
    alias: Annotated[str, typer.Option(help="Alias to point at the new version: candidate, live.")] = "",
    validation: Annotated[Path | None, typer.Option(help="File of rows to evaluate on.")] = None,
    format_: Annotated[str, typer.Option("--format", help="What the rows hold; unset: recognised.")] = "",
    job_id: Annotated[str, typer.Option("--job", help="Id of the job; unset: the service chooses.")] = "",
    flags: TrainingFlags,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job to its end.")] = True,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Train an adapter on a file of examples: upload, check, queue, watch.

    `slipstream train rows.jsonl --base smollm2-135m-instruct --adapter support --alias live --max-steps 20`
    """
    options = flags.options() | {"publish": {"adapter": adapter, "alias": alias or None}}

    async def work(client: SlipstreamClient) -> TrainingJob:
        dataset = await _dataset(client, data, validation, format_, as_json)
        require_usable(dataset, skip_invalid_rows=flags.skip_invalid_rows)
        job = await client.jobs.create(base, dataset.name, job_id=job_id, **options)
        _say_created(job, watch, as_json)
        if not watch:
            return job
        return await follow(client, job.name, after_sequence=0, as_json=as_json)

    job = target.run(work)
    if watch:
        end_with(job, as_json=as_json)


async def _dataset(
    client: SlipstreamClient, data: str, validation: Path | None, format_: str, as_json: bool
) -> Dataset:
    """The dataset to train on, its rows read."""
    if data.startswith(DATASET_PREFIX):
        if validation is not None or format_:
            raise typer.BadParameter("say at the upload what a dataset holds", param_hint="--validation, --format")
        return await client.datasets.wait(data)
    files = {"train": Path(data), "validation": validation}
    dataset = await upload_dataset(
        client, {split: path for split, path in files.items() if path is not None}, format=format_
    )
    if as_json:
        terminal.print_json({"event": "dataset_uploaded", "dataset": dataset})
    else:
        say_uploaded(dataset)
    return dataset


def _say_created(job: TrainingJob, watch: bool, as_json: bool) -> None:
    if as_json:
        terminal.print_json({"event": "job_created", "job": job})
        return
    follow_up = "" if watch else f" [dim]· slipstream jobs watch {escape(job.id)}[/]"
    terminal.out.print(f"[green]✓[/] [bold]{escape(job.id)}[/] is queued{follow_up}")
