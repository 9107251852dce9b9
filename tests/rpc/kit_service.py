"""A small service for the kit's tests: raw bytes, one method of every kind, whatever misbehaviour a test asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from slipstream_server.config import ListenConfig
from slipstream_server.rpc.request_context import caller, remaining_s
from slipstream_server.rpc.server import Mount, RpcServer, open_server

NAME = "test.kit.v1.KitService"


class KitServicer:
    """``outcome`` decides what Call does: a callable that returns the answer or raises."""

    def __init__(self) -> None:
        self.outcome: Callable[[bytes], bytes] = lambda request: request
        self.release = asyncio.Event()
        self.entered = 0
        self.closed = 0

    async def Call(self, request: bytes, context: Any) -> bytes:
        self.entered += 1
        return self.outcome(request)

    async def Stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """One message, then ``outcome``, then the end."""
        self.entered += 1
        yield b"first"
        yield self.outcome(request)

    async def Hold(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """One message, then nothing until the test releases it, then one more."""
        self.entered += 1
        try:
            yield b"begun"
            await self.release.wait()
            yield b"ended"
        finally:
            self.closed += 1

    async def WatchForever(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.entered += 1
        yield b"watching"
        await asyncio.Event().wait()

    async def Collect(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b",".join([request async for request in requests])

    async def Chat(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield self.outcome(request)

    async def Flood(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Megabytes without end, for a reader that does not read."""
        self.entered += 1
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            self.closed += 1

    async def WhoAmI(self, request: bytes, context: Any) -> bytes:
        return caller().encode()

    async def TimeLeft(self, request: bytes, context: Any) -> bytes:
        return str(remaining_s()).encode()


def parse_ascii(data: bytes) -> bytes:
    """Stands in for a message parser: some bytes are no message."""
    data.decode("ascii")
    return data


def add_kit_servicer(servicer: KitServicer, server: Any) -> None:
    """What the generated ``add_XServicer_to_server`` functions do."""

    def handler(make: Any, name: str) -> Any:
        return make(getattr(servicer, name), parse_ascii, None)

    handlers = {
        name: handler(make, name)
        for make, names in (
            (grpc.unary_unary_rpc_method_handler, ("Call", "WhoAmI", "TimeLeft")),
            (grpc.unary_stream_rpc_method_handler, ("Stream", "Hold", "WatchForever", "Flood")),
            (grpc.stream_unary_rpc_method_handler, ("Collect",)),
            (grpc.stream_stream_rpc_method_handler, ("Chat",)),
        )
        for name in names
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
    server.add_registered_method_handlers(NAME, handlers)


class KitClient:
    """Calls by method name, with or without metadata."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def unary(self, name: str, request: bytes = b"", **kwargs: Any) -> Any:
        return self.channel.unary_unary(f"/{NAME}/{name}")(request, **kwargs)

    def stream(self, name: str, request: bytes = b"", **kwargs: Any) -> Any:
        return self.channel.unary_stream(f"/{NAME}/{name}")(request, **kwargs)

    def requests(self, name: str, requests: list[bytes]) -> Any:
        kind = self.channel.stream_unary if name == "Collect" else self.channel.stream_stream
        return kind(f"/{NAME}/{name}")(iter(requests))


@asynccontextmanager
async def kit_server(
    listen: ListenConfig | None = None, *, servicer: KitServicer | None = None
) -> AsyncIterator[tuple[RpcServer, KitServicer, KitClient]]:
    """A running server with the kit service, and a plaintext client of it."""
    serving = servicer or KitServicer()
    async with (
        open_server([Mount(add_kit_servicer, serving)], listen or ListenConfig()) as server,
        grpc.aio.insecure_channel(
            f"127.0.0.1:{server.port}", options=(("grpc.max_send_message_length", -1),)
        ) as channel,
    ):
        yield server, serving, KitClient(channel)


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details of a failed call by short type name; unpacked without the product's own code."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    found: dict[str, Any] = {}
    for detail in status.details:
        name = detail.type_url.rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        assert detail.Unpack(message)
        found[name] = message
    return found
