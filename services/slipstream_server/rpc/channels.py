"""Channels from one service to another: TLS, token, keepalive, and what must travel on with every call.

A channel from ``open_channel`` adds to each call the service's own token, the request id of the call being answered,
and, where the caller gives no timeout, what is left of that call's deadline: gRPC passes neither on by itself. This is
done around the stub's callables and not by interceptors, which cost a task per stream and lose cancellation on
abandoned ones. Lives on the event loop that opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from slipstream_server.logs import request_id
from slipstream_server.rpc.calls import REQUEST_ID_KEY
from slipstream_server.rpc.request_context import remaining_s
from slipstream_server.rpc.tokens import first_token

Metadata = Sequence[tuple[str, str | bytes]]

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A peer that vanished is noticed while calls run; an idle channel stays silent.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A restarted service is found again soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another service: ``address`` is HOST:PORT or a gRPC target; TLS where ``tls_ca`` (PEM) is given."""

    address: str
    tls_ca: Path | None = None
    token_file: Path | None = None


def open_channel(peer: Peer) -> grpc.aio.Channel:
    """A channel for generated stubs. Close it. Raises OSError or ``TokenFileError`` when a file cannot be read."""
    token = first_token(peer.token_file) if peer.token_file else None
    if peer.tls_ca is None:
        channel = grpc.aio.insecure_channel(peer.address, options=_OPTIONS)
    else:
        credentials = grpc.ssl_channel_credentials(root_certificates=peer.tls_ca.read_bytes())
        channel = grpc.aio.secure_channel(peer.address, credentials, options=_OPTIONS)
    return _ForwardingChannel(channel, token)


class _ForwardingChannel(grpc.aio.Channel):
    """A channel whose calls carry token, request id and deadline on."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None) -> None:
        self._channel = channel
        self._token = token

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._forwarding(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._forwarding(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._forwarding(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._forwarding(self._channel.stream_stream(*args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def _forwarding(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def forward(
            request: Any = None, *, timeout: float | None = None, metadata: Metadata | None = None, **kwargs: Any
        ) -> Any:
            left_s = timeout if timeout is not None else remaining_s()
            return call(request, timeout=left_s, metadata=self._metadata(metadata), **kwargs)

        return forward

    def _metadata(self, given: Metadata | None) -> tuple[tuple[str, str | bytes], ...]:
        entries = tuple(given or ())
        names = {key for key, _ in entries}
        if self._token is not None and "authorization" not in names:
            entries += (("authorization", f"Bearer {self._token}"),)
        if (rid := request_id.get()) and REQUEST_ID_KEY not in names:
            entries += ((REQUEST_ID_KEY, rid),)
        return entries
