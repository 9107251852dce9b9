"""Following a job to its end: what ``jobs watch`` and ``train`` do."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import typer

from slipstream_client.cli import terminal
from slipstream_client.cli.job_lines import outcome
from slipstream_client.cli.job_view import JobView
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.job_events import JobEvent
from slipstream_client.jobs import TrainingJob


async def follow(client: SlipstreamClient, name: str, *, after_sequence: int, as_json: bool) -> TrainingJob:
    """Show the job's events until it has ended; the job then. Ctrl-C ends the watch, not the job."""
    try:
        if as_json:
            await _print_events(client, name, after_sequence)
        else:
            await _show_events(client, name, after_sequence)
    except asyncio.CancelledError:
        terminal.note(f"\nthe job goes on: slipstream jobs watch {name} · slipstream jobs cancel {name}")
        raise
    return await client.jobs.get(name)


async def _show_events(client: SlipstreamClient, name: str, after_sequence: int) -> None:
    with JobView() as view:
        async for event in client.jobs.watch(name, after_sequence=after_sequence, on_disconnect=view.lost):
            view.take(event)


async def _print_events(client: SlipstreamClient, name: str, after_sequence: int) -> None:
    def lost(error: SlipstreamClientError) -> None:
        terminal.warn(f"{error}; trying again")

    async for event in client.jobs.watch(name, after_sequence=after_sequence, on_disconnect=lost):
        terminal.print_json(event_object(event))


def event_object(event: JobEvent) -> dict[str, Any]:
    """The event as one flat JSON object."""
    payload = event.payload
    fields = {} if payload is None else {f.name: getattr(payload, f.name) for f in dataclasses.fields(payload)}
    head = {"event": event.kind or "unknown", "sequence": event.sequence, "attempt": event.attempt, "time": event.time}
    return head | fields


def end_with(job: TrainingJob, *, as_json: bool) -> None:
    """Say how the job ended; exit code 1 unless it succeeded."""
    if not as_json:
        terminal.out.print(outcome(job))
        if job.state == "succeeded" and job.result is not None and job.result.adapter_version:
            _hint(job)
    if job.state != "succeeded":
        raise typer.Exit(1)


def _hint(job: TrainingJob) -> None:
    assert job.result is not None
    _, adapter, _, version = job.result.adapter_version.split("/")
    moved = job.result.alias is not None and job.result.alias.moved
    alias = job.result.alias.alias.rpartition("/")[2] if moved and job.result.alias is not None else version
    prefix = "" if alias == "live" else f"slipstream adapters promote {adapter} {version} · "
    terminal.note(f'  {prefix}slipstream compare "…" --adapters base,{adapter}@{alias}')
