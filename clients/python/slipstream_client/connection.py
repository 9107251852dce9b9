"""One channel for each service, and the two ways to call through it: with deadline, request id, token and retries.

Channels belong to the event loop that first uses them. Not known here: what the messages mean.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import grpc

from slipstream_client.errors import InvalidRequestError, SlipstreamClientError, from_rpc_error
from slipstream_client.settings import ClientSettings

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Event = TypeVar("Event")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_REQUEST_ID_CHARACTERS = 64
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A dead peer behind a silent network is noticed within 40 s; an idle channel does not ping.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted service is found again in seconds; gRPC's own default grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Several replicas behind one name share the calls.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)


class Connection:
    """The channels of one client. Not thread-safe: everything happens on one event loop."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self._channels: dict[str, grpc.aio.Channel] = {}

    def channel(self, service: str) -> grpc.aio.Channel:
        """The channel to ``service``, made at its first use; it connects by itself, and again after a loss."""
        if service not in self._channels:
            self._channels[service] = _open_channel(self.settings.addresses[service], self.settings)
        return self._channels[service]

    async def close(self) -> None:
        """Close every channel; calls still running are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))

    async def unary(
        self,
        service: str,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Answer],
        request: Request,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        idempotent: bool = True,
    ) -> Answer:
        """Call ``method`` and return its answer; repeated, where that may help, only if ``idempotent``."""
        attempts = Attempts(self.settings, service, timeout_s, request_id, repeatable=idempotent)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s, metadata=attempts.metadata)
            except grpc.aio.AioRpcError as error:
                await attempts.wait_or_raise(error)

    async def upload(
        self,
        service: str,
        method: grpc.aio.StreamUnaryMultiCallable[Request, Answer],
        messages: Callable[[], AsyncIterator[Request]],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        idempotent: bool = True,
    ) -> Answer:
        """Send the messages, and return the answer; where that may help they are asked for, and sent, once more."""
        attempts = Attempts(self.settings, service, timeout_s, request_id, repeatable=idempotent)
        while True:
            source = Source(messages())
            call = method(source, timeout=attempts.remaining_s, metadata=attempts.metadata)
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                await attempts.wait_or_raise(error)
            except asyncio.CancelledError:
                # gRPC cancels the call when its messages cannot be had; then their failure is the one to tell.
                if source.failure is not None:
                    raise source.failure from None
                raise
            finally:
                call.cancel()

    async def stream(
        self,
        service: str,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Event],
        request: Request,
        *,
        is_answer: Callable[[Event], bool],
        timeout_s: float | None = None,
        request_id: str | None = None,
        idempotent: bool = True,
    ) -> AsyncGenerator[Event]:
        """The events of a call.

        Repeated only before the first event that ``is_answer``; cancelled on the server when left early.
        """
        attempts = Attempts(self.settings, service, timeout_s, request_id, repeatable=idempotent)
        while True:
            call = method(request, timeout=attempts.remaining_s, metadata=attempts.metadata)
            try:
                async for event in call:
                    attempts.repeatable = attempts.repeatable and not is_answer(event)
                    yield event
                return
            except grpc.aio.AioRpcError as error:
                await attempts.wait_or_raise(error)
            finally:
                call.cancel()  # gRPC itself goes on with a call whose iteration was abandoned


class Source(AsyncIterator[Request]):
    """The messages of an upload; remembers why they could not be had."""

    def __init__(self, messages: AsyncIterator[Request]) -> None:
        self._messages = messages
        self.failure: Exception | None = None

    async def __anext__(self) -> Request:
        try:
            return await anext(self._messages)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.failure = error
            raise


class Attempts:
    """The attempts at one call: they share one deadline and one request id."""

    def __init__(
        self,
        settings: ClientSettings,
        service: str,
        timeout_s: float | None,
        request_id: str | None,
        *,
        repeatable: bool,
    ) -> None:
        self._settings = settings
        self._service = service
        self._deadline_s = time.monotonic() + _checked_timeout_s(timeout_s, settings)
        self._numbers = itertools.count(1)
        self.repeatable = repeatable
        self.request_id = checked_request_id(request_id)

    @property
    def remaining_s(self) -> float:
        """What the deadline leaves."""
        return max(0.0, self._deadline_s - time.monotonic())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of every attempt."""
        token = self._settings.token
        return (("x-request-id", self.request_id), *((("authorization", f"Bearer {token}"),) if token else ()))

    async def wait_or_raise(self, error: grpc.aio.AioRpcError) -> None:
        """Return when it is time for the next attempt; raise what ``error`` means where there is none."""
        failure = self._understood(error)
        failed_attempts = next(self._numbers)
        delay_s = (
            self._settings.retries.delay_s(failed_attempts, failure, self.remaining_s) if self.repeatable else None
        )
        if delay_s is None:
            raise failure from error
        await asyncio.sleep(delay_s)

    def _understood(self, error: grpc.aio.AioRpcError) -> SlipstreamClientError:
        address = self._settings.addresses[self._service]
        return from_rpc_error(error, service=self._service, address=address, request_id=self.request_id)


def checked_request_id(request_id: str | None) -> str:
    """``request_id``, fit for a header; a new one where there is none."""
    if request_id is None:
        return uuid.uuid4().hex
    printable = request_id.isascii() and request_id.isprintable() and request_id == request_id.strip()
    if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARACTERS or not printable:
        raise InvalidRequestError.of(
            "request_id", f"{request_id!r} is not 1 to {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters"
        )
    return request_id


def _checked_timeout_s(timeout_s: float | None, settings: ClientSettings) -> float:
    if timeout_s is None:
        return settings.timeout_s
    if not 0 < timeout_s <= 86_400:
        raise InvalidRequestError.of("timeout_s", f"{timeout_s} is not above 0 and at most 86400")
    return timeout_s


def _open_channel(address: str, settings: ClientSettings) -> grpc.aio.Channel:
    if not settings.tls:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_pem(settings.ca_cert, "ca_cert"),
        private_key=_pem(settings.client_key, "client_key"),
        certificate_chain=_pem(settings.client_cert, "client_cert"),
    )
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)


def _pem(path: Path | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError.of(name, f"cannot read {str(path)!r}: {error.strerror}") from error
