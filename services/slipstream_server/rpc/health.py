"""Which services of this process are serving: the standard ``grpc.health.v1`` on two doors.

``HealthBoard`` holds the truth, on the event loop. ``HealthServicer`` answers from it on the main port. The port for
probes is a small server with threads of its own, plaintext and without tokens: it answers even while thousands of calls
queue up on the loop. "" is the whole process: SERVING while every service is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from slipstream_server import errors

SERVICE_NAME: str = health.SERVICE_NAME
OVERALL = ""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthBoard:
    """Serving or not, by full service name; everything starts as not serving."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(services, False)
        self._shutting_down = False
        self._watchers: set[asyncio.Event] = set()
        self.for_probes = health.HealthServicer()
        self._publish()

    def set(self, service: str, serving: bool) -> None:
        """Say whether ``service`` serves; without effect once the shutdown has begun."""
        if not self._shutting_down and self._serving.get(service) != serving:
            self._serving[service] = serving
            self._publish()

    def enter_graceful_shutdown(self) -> None:
        """NOT_SERVING from now on, for good."""
        self._serving = dict.fromkeys(self._serving, False)
        self._shutting_down = True
        self._publish()

    def is_serving(self, service: str = OVERALL) -> bool | None:
        """None for a service that does not exist."""
        if service == OVERALL:
            return not self._shutting_down and all(self._serving.values())
        return self._serving.get(service)

    async def wait_serving(self, service: str = OVERALL) -> None:
        """Return once ``service`` serves."""
        async for serving in self.changes(service):
            if serving:
                return

    async def changes(self, service: str) -> AsyncIterator[bool | None]:
        """The state now, then each time it differs; changes that nobody awaited are skipped over."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            last = self.is_serving(service)
            yield last
            while True:
                await changed.wait()
                changed.clear()
                if (state := self.is_serving(service)) != last:
                    last = state
                    yield state
        finally:
            self._watchers.discard(changed)

    def _publish(self) -> None:
        for service in (OVERALL, *self._serving):
            self.for_probes.set(service, _status(self.is_serving(service)))
        for changed in self._watchers:
            changed.set()


class HealthServicer(health_pb2_grpc.HealthServicer):
    """``grpc.health.v1.Health`` on the main port."""

    def __init__(self, board: HealthBoard) -> None:
        self._board = board

    async def Check(self, request: Any, context: object) -> Any:
        state = self._board.is_serving(request.service)
        if state is None:
            raise errors.NotFound(f"service {request.service!r} is not served here")
        return health_pb2.HealthCheckResponse(status=_status(state))

    async def Watch(self, request: Any, context: object) -> AsyncIterator[Any]:
        async for state in self._board.changes(request.service):
            yield health_pb2.HealthCheckResponse(status=_status(state))


class ProbePort:
    """A plaintext server that knows nothing but health, in threads of its own."""

    def __init__(self, board: HealthBoard, *, host: str, port: int) -> None:
        options = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 4096))
        self._server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="probe-port"), options=options)
        health_pb2_grpc.add_HealthServicer_to_server(board.for_probes, self._server)
        self.port = self._server.add_insecure_port(f"{host}:{port}")
        self._server.start()

    async def close(self) -> None:
        """Stop answering; returns when the port is free."""
        stopped = self._server.stop(grace=0.2)
        await asyncio.to_thread(stopped.wait, 5.0)


def _status(serving: bool | None) -> Any:
    if serving is None:
        return _UNKNOWN
    return _SERVING if serving else _NOT_SERVING
