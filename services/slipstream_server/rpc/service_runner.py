"""Runs one service from start to the end of its process: ports, health, background tasks, signals, drain.

Every ``slipstream serve ...`` ends here. The exit code tells how it ended: 0 after a drain that SIGTERM or SIGINT
began, 1 when something that must run for as long as the service does has died. Lives on the main thread's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from slipstream_server.config import ListenConfig
from slipstream_server.otel import export_metrics
from slipstream_server.rpc.server import Mount, RpcServer
from slipstream_server.rpc.telemetry import new_registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service as the runner sees it.

    ``background``: coroutines that run as long as the service; the first one to end, however, stops it with exit code
    1. They go on during the drain, because calls that are still running need them, and are cancelled after it.
    """

    name: str
    mounts: Sequence[Mount]
    background: Mapping[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    registry: CollectorRegistry = field(default_factory=new_registry)


async def run_service(
    service: Service,
    listen: ListenConfig,
    *,
    on_started: Callable[[RpcServer], None] | None = None,
    on_serving: Callable[[RpcServer], None] | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or ``stop``; returns the process's exit code.

    ``on_started`` runs when the ports answer, ``on_serving`` when everything is SERVING for the first time
    (``announce`` prints the line that says so). A second signal ends the drain. Raises ``ConfigError`` when the ports
    cannot be opened.
    """
    stopping = stop or asyncio.Event()
    server = RpcServer(service.mounts, listen, service.registry)
    end_export = export_metrics(service.name)
    with _signals(stopping) as impatient:
        await server.start()
        try:
            logger.info("%s listens on %s:%d", service.name, listen.host, server.port)
            if on_started is not None:
                on_started(server)
            async with _background(service, server, on_serving) as tasks:
                died = await _first_death(tasks, stopping)
                await _drain(server, listen.drain_grace_s if died is None else 0.0, impatient)
        finally:
            await server.close()
            # It may wait for a collector that does not answer.
            await asyncio.to_thread(end_export)
    logger.info("%s has stopped", service.name)
    return 0 if died is None else 1


def announce(service: str, host: str, server: RpcServer) -> None:
    """Print the line by which a supervisor or a person learns that ``service`` is SERVING, and on which ports."""
    ports = f"{host}:{server.port} metrics={server.metrics_port} health={server.probe_port}"
    sys.stdout.write(f"{service} SERVING {ports}\n")
    sys.stdout.flush()


@contextlib.asynccontextmanager
async def _background(
    service: Service, server: RpcServer, on_serving: Callable[[RpcServer], None] | None
) -> AsyncIterator[dict[str, asyncio.Task[None]]]:
    work = {"readiness": server.follow_readiness, **service.background}
    tasks = {name: asyncio.create_task(_run(run), name=name) for name, run in work.items()}
    announcing = asyncio.create_task(_announce(service.name, server, on_serving))
    try:
        yield tasks
    finally:
        for task in (*tasks.values(), announcing):
            task.cancel()
        await asyncio.gather(*tasks.values(), announcing, return_exceptions=True)


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    await work()


async def _announce(name: str, server: RpcServer, on_serving: Callable[[RpcServer], None] | None) -> None:
    await server.health.wait_serving()
    logger.info("%s is SERVING on port %d", name, server.port)
    if on_serving is not None:
        on_serving(server)


async def _first_death(tasks: Mapping[str, asyncio.Task[None]], stopping: asyncio.Event) -> str | None:
    """The name of the background task that ended, or None when the service was asked to stop."""
    asked = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((asked, *tasks.values()), return_when=asyncio.FIRST_COMPLETED)
    finally:
        asked.cancel()
    for name, task in tasks.items():
        if task.done():
            failure = None if task.cancelled() else task.exception()
            logger.critical("background task %r has ended; the service stops", name, exc_info=failure)
            return name
    return None


async def _drain(server: RpcServer, grace_s: float, impatient: asyncio.Event) -> None:
    logger.info("draining: %d calls are running, grace %g s", len(server.calls), grace_s)
    drain = asyncio.create_task(server.drain(grace_s))
    hurried = asyncio.create_task(impatient.wait())
    await asyncio.wait((drain, hurried), return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not drain.done():
        logger.warning("second signal: running calls are ended now")
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await server.drain(0.0)


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[asyncio.Event]:
    """The first SIGTERM or SIGINT sets ``stopping``, the second one the event this yields."""
    impatient = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (impatient if stopping.is_set() else stopping).set()

    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, on_signal)
    try:
        yield impatient
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
