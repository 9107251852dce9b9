"""``slipstream top``: what the models do, live.

Health and models come over gRPC, the figures from the inference service's metrics port, which follows from its address
(port + 1000) unless ``--metrics-address`` says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.live import Live

from slipstream_client.cli import terminal
from slipstream_client.cli.metrics_port import MetricsUnavailable, Samples, metrics_address, read_metrics
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.top_figures import WINDOW_S, ModelFigures, Recorder
from slipstream_client.cli.top_view import Frame, TopView
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.models import Model

TIMEOUT_S = 3.0

Interval = Annotated[float, typer.Option("--interval", "-i", help="Seconds between two looks.", min=0.2, max=3600)]
Once = Annotated[bool, typer.Option("--once", help="Look for one interval, print that and end.")]
MetricsAddress = Annotated[
    str, typer.Option(help="HOST:PORT of inference's metrics, where it is not the service's port + 1000.")
]


@with_groups
def top(
    interval: Interval = 2.0,
    once: Once = False,
    metrics_address: MetricsAddress = "",
    as_json: terminal.JsonFlag = False,
    *,
    target: Target,
) -> None:
    """Watch the services and their models: batch, queue, KV cache, tokens per second, latencies. Ctrl-C ends it."""
    options = Options(interval_s=interval, once=once, metrics_address=metrics_address, as_json=as_json)
    with contextlib.suppress(KeyboardInterrupt):  # the way out, not a failure
        target.run(lambda client: _watch(client, options))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to watch. ``metrics_address`` empty: where the service's own address leads."""

    interval_s: float
    once: bool
    metrics_address: str
    as_json: bool


async def _watch(client: SlipstreamClient, options: Options) -> None:
    frames = _frames(client, options)
    if options.as_json:
        async for frame in frames:
            terminal.print_json(_object(frame))
    elif options.once or not terminal.out.is_terminal:
        async for frame in frames:
            terminal.out.print(TopView(frame), soft_wrap=False)
    else:
        await _draw(frames, f"every {options.interval_s:g} s")


async def _draw(frames: AsyncIterator[Frame], note: str) -> None:
    with Live(console=terminal.out, screen=True, auto_refresh=False) as live:
        async for frame in frames:
            live.update(TopView(frame, note=note), refresh=True)


async def _frames(client: SlipstreamClient, options: Options) -> AsyncIterator[Frame]:
    """A frame every interval, for ever or ``once``; the first one on a screen cannot tell rates yet."""
    recorder = Recorder(None if options.once else WINDOW_S)
    first = await _look(client, recorder, options)
    if terminal.out.is_terminal and not options.once and not options.as_json:
        yield first
    while True:
        await asyncio.sleep(options.interval_s)
        yield await _look(client, recorder, options)
        if options.once:
            return


async def _look(client: SlipstreamClient, recorder: Recorder, options: Options) -> Frame:
    services, models, (figures, problem) = await asyncio.gather(
        client.status(timeout_s=TIMEOUT_S), _models(client), _figures(client, recorder, options)
    )
    return Frame(time=datetime.now(UTC), services=tuple(services), models=models, figures=figures, problem=problem)


async def _models(client: SlipstreamClient) -> tuple[Model, ...]:
    """No models where the service does not answer: its health says so already."""
    with contextlib.suppress(SlipstreamClientError):
        return tuple(await client.models.list(timeout_s=TIMEOUT_S))
    return ()


async def _figures(
    client: SlipstreamClient, recorder: Recorder, options: Options
) -> tuple[tuple[ModelFigures, ...], str]:
    try:
        samples = await asyncio.to_thread(_read, client, options)
    except MetricsUnavailable as failure:
        return (), str(failure)
    return recorder.take(time.monotonic(), samples), ""


def _read(client: SlipstreamClient, options: Options) -> Samples:
    address = options.metrics_address or metrics_address(client.settings.addresses["inference"])
    return read_metrics(address, client.settings, timeout_s=TIMEOUT_S)


def _object(frame: Frame) -> dict[str, object]:
    """The frame as one JSON object: each model's state beside its figures."""
    states = {model.id: model.state for model in frame.models}
    return {
        "time": frame.time,
        "services": [{"service": s.service, "state": s.state, "latency_ms": s.latency_ms} for s in frame.services],
        "models": [{"state": states.get(figures.model, ""), "figures": figures} for figures in frame.figures],
        "problem": frame.problem,
    }
