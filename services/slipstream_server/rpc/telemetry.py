"""Metrics of the server, and the HTTP port they are scraped from.

Names follow OpenTelemetry (``rpc.server.call.duration``) in Prometheus spelling. One registry per service, so that
several can live in one process; rooms add their own collectors to it. Durations of calls also go to OpenTelemetry's
own meter, where there is one. The port is answered by threads of its own: a stalled event loop still shows up in a
scrape. Where the service asks for a token, so does the port, and it speaks TLS where the service does.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from functools import partial
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    make_wsgi_app,
)

from slipstream_server.otel import duration_histogram

logger = logging.getLogger(__name__)

_DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_SOCKET_TIMEOUT_S = 10.0


def new_registry() -> CollectorRegistry:
    """A registry that already tells the process's memory, CPU time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class RpcMetrics:
    """Calls by method and status code. ``method`` is ``/package.Service/Method`` of a known method, else "_OTHER"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._duration = Histogram(
            "rpc_server_call_duration_seconds",
            "Time from a call's acceptance to its status.",
            ("rpc_method", "rpc_response_status_code"),
            buckets=_DURATION_BUCKETS_S,
            registry=registry,
        )
        self._otel_duration = duration_histogram(
            "rpc.server.call.duration", "Time from a call's acceptance to its status.", _DURATION_BUCKETS_S
        )
        self._running = Gauge("slipstream_rpc_calls_running", "Calls in progress.", ("rpc_method",), registry=registry)
        self.loop_stalls = Counter(
            "slipstream_event_loop_stalls_total", "Times the event loop stood still over 200 ms.", registry=registry
        )

    def started(self, method: str) -> None:
        self._running.labels(method.lstrip("/")).inc()

    def finished(self, method: str, code: grpc.StatusCode, duration_s: float) -> None:
        name = method.lstrip("/")
        self._running.labels(name).dec()
        self._duration.labels(name, code.name).observe(duration_s)
        if self._otel_duration is not None:
            self._otel_duration.record(duration_s, _attributes(name, code))


def _attributes(method: str, code: grpc.StatusCode) -> dict[str, str]:
    known = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code.name}
    return known if code is grpc.StatusCode.OK else {**known, "error.type": code.name}


class _Handler(WSGIRequestHandler):
    timeout = _SOCKET_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        logger.debug("metrics port: %s", format % args)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def server_bind(self) -> None:
        # Without WSGIServer's reverse look-up of the host's name, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class MetricsPort:
    """Serves ``GET /metrics`` in threads of its own until ``close``. Raises OSError if the port is taken."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int,
        token_accepted: Callable[[str], bool] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._scrape: Any = make_wsgi_app(registry)
        self._token_accepted = token_accepted
        server_class = _server_class_for(host)
        self._server = server_class((host.strip("[]"), port), _Handler)
        if tls is not None:
            # The handshake happens in the connection's own thread, so that one slow client does not hold the port.
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._server.set_app(self._answer)
        self.port = self._server.server_port
        # The poll interval bounds how long ``close`` waits; a scrape is answered at once whatever it is.
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        self._thread = threading.Thread(target=serve, name="metrics-port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; returns when the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not self._is_allowed(environ.get("HTTP_AUTHORIZATION", "")):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
            return [b""]
        if environ.get("REQUEST_METHOD") != "GET" or environ.get("PATH_INFO") != "/metrics":
            start_response("404 Not Found", [("Content-Length", "0")])
            return [b""]
        body: Iterable[bytes] = self._scrape(environ, start_response)
        return body

    def _is_allowed(self, authorization: str) -> bool:
        if self._token_accepted is None:
            return True
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and self._token_accepted(token.strip())


def _server_class_for(host: str) -> type[_Server]:
    if ":" not in host:
        return _Server
    return type("_ServerV6", (_Server,), {"address_family": socket.AF_INET6})
