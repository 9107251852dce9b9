"""``slipstream status``: how every service is, and what the models do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import typer
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.metrics_port import MetricsUnavailable, Samples, metrics_address, read_metrics, total
from slipstream_client.cli.model_rows import model_table
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.models import Model
from slipstream_client.results import HealthState, ServiceHealth

TIMEOUT_S = 3.0
LOOKS = {
    HealthState.SERVING: "[green]●[/] serving",
    HealthState.NOT_SERVING: "[yellow]●[/] not serving",
    HealthState.UNKNOWN: "[yellow]?[/] unknown",
    HealthState.UNREACHABLE: "[red]○[/] not running",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """All that ``status`` shows.

    ``running_count`` and ``waiting_count``: requests at inference; None where its metrics are out of reach.
    """

    services: tuple[ServiceHealth, ...]
    default_model: str
    models: tuple[Model, ...]
    running_count: int | None
    waiting_count: int | None


@with_groups
def status(as_json: terminal.JsonFlag = False, *, target: Target) -> None:
    """Show the health of every service, the models and the queue. Exit code 1 unless inference serves."""
    overview = target.run(_overview)
    if as_json:
        terminal.print_json(overview)
    else:
        _print(overview)
    if overview.services[0].state is not HealthState.SERVING:
        raise typer.Exit(1)


async def _overview(client: SlipstreamClient) -> Overview:
    services = await client.status(timeout_s=TIMEOUT_S)
    if services[0].state is HealthState.UNREACHABLE:
        return Overview(services=tuple(services), default_model="", models=(), running_count=None, waiting_count=None)
    models, default_model, metrics = await asyncio.gather(
        _models(client), _default_model(client), asyncio.to_thread(_metrics, client, services[0].address)
    )
    return Overview(
        services=tuple(services),
        default_model=default_model,
        models=models,
        running_count=_count(metrics, "slipstream_num_requests_running"),
        waiting_count=_count(metrics, "slipstream_num_requests_waiting"),
    )


async def _models(client: SlipstreamClient) -> tuple[Model, ...]:
    try:
        return tuple(await client.models.list(timeout_s=TIMEOUT_S))
    except SlipstreamClientError as error:
        terminal.note(f"the models cannot be listed: {error}")
        return ()


async def _default_model(client: SlipstreamClient) -> str:
    """The model that answers requests which name none: its tokenizer says so."""
    try:
        return (await client.count_tokens("x", timeout_s=TIMEOUT_S)).model
    except SlipstreamClientError:
        return ""


def _metrics(client: SlipstreamClient, address: str) -> Samples:
    """What the inference service's metrics port tells; nothing where that is out of reach."""
    try:
        return read_metrics(metrics_address(address), client.settings, timeout_s=TIMEOUT_S)
    except MetricsUnavailable:
        return ()


def _count(metrics: Samples, name: str) -> int | None:
    value = total(metrics, name)
    return None if value is None else round(value)


def _print(overview: Overview) -> None:
    rows = terminal.table("service", "address", "state", "answered in", right=("answered in",))
    for service in overview.services:
        latency = "" if service.latency_ms is None else f"{service.latency_ms:.1f} ms"
        rows.add_row(f"[bold]{service.service}[/]", service.address, LOOKS[service.state], latency)
    terminal.plain_table(rows)
    if overview.models:
        terminal.out.print()
        terminal.plain_table(model_table(overview.models, overview.default_model))
    if overview.running_count is not None:
        queue = f"\nrequests: {overview.running_count} running, {overview.waiting_count or 0} waiting"
        terminal.out.print(Text(queue, style="dim"))
    for problem in {service.problem for service in overview.services if service.state is HealthState.UNKNOWN}:
        terminal.warn(problem)
    if overview.services[0].state is HealthState.UNREACHABLE:
        terminal.note("start them with `slipstream up`, or point SLIPSTREAM_ADDRESS at those that run")
