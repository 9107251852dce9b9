"""One gRPC server with everything around it: TLS, tokens, health, reflection, metrics, probes, drain.

``open_server`` builds and starts it; ``RpcServer.drain`` ends it. Knows nothing of what the services do. Lives on the
event loop, beside the two small ports (metrics, probes) that have threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from slipstream_server.config import ConfigError, ListenConfig
from slipstream_server.rpc.calls import CallLimits, MethodGuard, RunningCalls
from slipstream_server.rpc.health import SERVICE_NAME as HEALTH_SERVICE
from slipstream_server.rpc.health import HealthBoard, HealthServicer, ProbePort
from slipstream_server.rpc.router import Mounted, Router, draining, is_infrastructure, mounted_by
from slipstream_server.rpc.stalls import StallWatch
from slipstream_server.rpc.telemetry import MetricsPort, RpcMetrics, new_registry
from slipstream_server.rpc.tokens import TokenFile, TokenFileError

logger = logging.getLogger(__name__)

# How long calls that the drain has cut may take to send their status.
_FLUSH_S = 2.0
_MAX_CONCURRENT_STREAMS = 20_000


@dataclass(frozen=True, slots=True)
class Mount:
    """A servicer and the generated ``add_XServicer_to_server`` that knows its methods.

    ``readiness``: called once; yields whether the service can do its work, now and whenever that changes. None: as soon
    as the server has started.
    """

    add: Callable[[Any, Any], None]
    servicer: object
    readiness: Callable[[], AsyncIterator[bool]] | None = None


class RpcServer:
    """A started server. ``port``, ``metrics_port`` and ``probe_port`` are the real ones, also where 0 was asked for."""

    def __init__(self, mounts: Sequence[Mount], listen: ListenConfig, registry: CollectorRegistry) -> None:
        self._listen = listen
        self._tokens = _open_tokens(listen)
        self._metrics = RpcMetrics(registry)
        self.calls = RunningCalls()
        mounted = [mounted_by(mount.add, mount.servicer) for mount in mounts]
        names = [mount.service for mount in mounted]
        self.health = HealthBoard(names)
        self._readiness = dict(zip(names, (mount.readiness for mount in mounts), strict=True))
        self._router = Router([*mounted, *self._infrastructure(names)], guard=self._guard(), tokens=self._tokens)
        self._server = grpc.aio.server(options=_options(listen))
        self._server.add_generic_rpc_handlers((self._router,))
        self._stalls = StallWatch(on_stall=self._metrics.loop_stalls.inc)
        self._registry = registry
        self.port = 0

    async def start(self) -> None:
        """Bind all ports and answer calls; services are NOT_SERVING until ``follow_readiness`` says otherwise.

        Raises ``ConfigError`` when a port is taken or the TLS files cannot be used.
        """
        listen = self._listen
        with _naming_port("port", listen.host, listen.port):
            self.port = self._add_port()
        with _naming_port("health_port", listen.host, listen.health_port):
            self._probes = ProbePort(self.health, host=_bracketed(listen.host), port=listen.health_port)
        with _naming_port("metrics_port", listen.host, listen.metrics_port):
            self._scrapes = MetricsPort(
                self._registry,
                host=listen.host,
                port=listen.metrics_port,
                token_accepted=self._accepts_token if self._tokens else None,
                tls=_ssl_context(listen),
            )
        await self._server.start()
        self._stalls.start()

    @property
    def metrics_port(self) -> int:
        return self._scrapes.port

    @property
    def probe_port(self) -> int:
        return self._probes.port

    async def follow_readiness(self) -> None:
        """Keep health as the services say it is; runs until cancelled, and fails if a service's readiness does."""
        async with asyncio.TaskGroup() as tasks:
            for name, readiness in self._readiness.items():
                if readiness is None:
                    self.health.set(name, True)
                else:
                    tasks.create_task(self._follow(name, readiness))
            await asyncio.get_running_loop().create_future()

    async def drain(self, grace_s: float) -> None:
        """NOT_SERVING at once, no new calls; running ones may end within ``grace_s``, the rest get UNAVAILABLE.

        Streams that only watch (``Watch...``) never end by themselves and are ended at once: their clients resume
        elsewhere.
        """
        self.health.enter_graceful_shutdown()
        self._router.refuse_new_calls()
        self.calls.cut(draining(), which=lambda method: _is_work(method) and _is_watch(method))
        try:
            async with asyncio.timeout(grace_s):
                await self.calls.wait_until_none(which=_is_work)
        except TimeoutError:
            count = self.calls.cut(draining(), which=_is_work)
            logger.warning("drain: %d calls outlived the grace of %g s and were ended", count, grace_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self.calls.wait_until_none(which=_is_work)

    async def close(self) -> None:
        """Stop everything and free the ports; what still runs is cancelled."""
        self._stalls.stop()
        await self._server.stop(grace=None if not len(self.calls) else 0.1)
        await self._probes.close()
        await asyncio.to_thread(self._scrapes.close)

    def _guard(self) -> MethodGuard:
        limits = CallLimits(
            max_message_bytes=self._listen.max_message_bytes, write_timeout_s=self._listen.write_timeout_s
        )
        return MethodGuard(calls=self.calls, metrics=self._metrics, limits=limits)

    def _infrastructure(self, names: Sequence[str]) -> list[Mounted]:
        all_names = (*names, HEALTH_SERVICE, reflection.SERVICE_NAME)
        return [
            mounted_by(health_pb2_grpc.add_HealthServicer_to_server, HealthServicer(self.health)),
            mounted_by(
                reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflection.aio.ReflectionServicer(all_names)
            ),
        ]

    def _add_port(self) -> int:
        address = f"{_bracketed(self._listen.host)}:{self._listen.port}"
        credentials = _credentials(self._listen)
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    def _accepts_token(self, token: str) -> bool:
        return self._tokens is not None and self._tokens.name_of(token) is not None

    async def _follow(self, name: str, readiness: Callable[[], AsyncIterator[bool]]) -> None:
        async for ready in readiness():
            if ready != self.health.is_serving(name):
                logger.info("%s is %s", name, "SERVING" if ready else "NOT_SERVING")
            self.health.set(name, ready)


@contextlib.asynccontextmanager
async def open_server(
    mounts: Sequence[Mount], listen: ListenConfig, *, registry: CollectorRegistry | None = None
) -> AsyncIterator[RpcServer]:
    """A server that answers and follows its services' readiness while the block runs; closed without a drain."""
    server = RpcServer(mounts, listen, registry or new_registry())
    await server.start()
    following = asyncio.create_task(server.follow_readiness(), name="readiness")
    try:
        await asyncio.sleep(0)
        yield server
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await server.close()


def _is_work(method: str) -> bool:
    return not is_infrastructure(method)


def _is_watch(method: str) -> bool:
    return method.rpartition("/")[2].startswith("Watch")


def _options(listen: ListenConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server shares the port silently
        # With the defaults a burst of a few thousand new streams is answered CANCELLED in part.
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 30_000),
        ("grpc.max_concurrent_streams", _MAX_CONCURRENT_STREAMS),
        ("grpc.max_receive_message_length", listen.max_transport_message_bytes),
        ("grpc.max_send_message_length", listen.max_transport_message_bytes),
        # A peer that is gone without a word is noticed within a minute; clients may ping every 10 s.
        ("grpc.keepalive_time_ms", 45_000),
        ("grpc.keepalive_timeout_ms", 15_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
    ]


def _open_tokens(listen: ListenConfig) -> TokenFile | None:
    if listen.token_file is None:
        return None
    try:
        return TokenFile(listen.token_file)
    except TokenFileError as error:
        raise ConfigError([f"common.token_file: {error}"]) from None


def _credentials(listen: ListenConfig) -> grpc.ServerCredentials | None:
    if listen.tls_cert is None or listen.tls_key is None:
        return None
    pair = (_read("tls_key", listen.tls_key), _read("tls_cert", listen.tls_cert))
    if listen.tls_client_ca is None:
        return grpc.ssl_server_credentials([pair])
    roots = _read("tls_client_ca", listen.tls_client_ca)
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=True)


def _ssl_context(listen: ListenConfig) -> ssl.SSLContext | None:
    if listen.tls_cert is None or listen.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(listen.tls_cert, listen.tls_key)
        if listen.tls_client_ca is not None:
            context.load_verify_locations(listen.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError):
        raise ConfigError(["common.tls_cert, tls_key: no usable certificate and key in PEM form"]) from None
    return context


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError([f"common.{key}: the file cannot be read: {error.strerror}"]) from None


@contextlib.contextmanager
def _naming_port(key: str, host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        logger.debug("cannot listen", exc_info=error)
        raise ConfigError([f"{key}: cannot listen on {host}:{port}; is the port in use?"]) from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
