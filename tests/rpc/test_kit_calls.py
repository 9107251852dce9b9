"""What surrounds every method: errors, malformed and oversized requests, ids, deadlines, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.request
from typing import Any

import grpc
import pytest
from tests.rpc.kit_service import NAME, KitServicer, details_of, kit_server

from slipstream_server import errors
from slipstream_server.config import ListenConfig
from slipstream_server.logs import request_id
from slipstream_server.rpc.server import Mount, open_server


def raising(error: BaseException) -> Any:
    def outcome(_request: bytes) -> bytes:
        raise error

    return outcome


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value


async def scrape(port: int) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(get)


LEAVES = [
    errors.InvalidField,
    errors.QueueFull,
    errors.GateClosed,
    errors.StaleEtag,
    errors.WorkerDied,
    errors.Cancelled,
]


@pytest.mark.parametrize("cls", LEAVES)
async def test_what_a_servicer_raises_is_what_the_client_sees(cls: type[errors.SlipstreamError]) -> None:
    async with kit_server() as (_, servicer, client):
        servicer.outcome = raising(cls("why", metadata={"k": "v"}))
        for call in (client.unary("Call"), client.stream("Stream"), client.requests("Chat", [b"x"])):
            error = await failure(call)
            assert error.details() == "why"
            info = details_of(error)["ErrorInfo"]
            assert (info.reason, info.domain, dict(info.metadata)) == (cls.reason, "slipstream", {"k": "v"})


@pytest.mark.parametrize("raised", [RuntimeError("zxsecret /etc/passwd"), BaseException("zxsecret panic /etc/passwd")])
@pytest.mark.parametrize("method", ["Call", "Stream"])
async def test_an_unhandled_exception_leaks_no_text(
    raised: BaseException, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with kit_server() as (_, servicer, client):
        servicer.outcome = raising(raised)
        error = await failure(client.unary(method) if method == "Call" else client.stream(method))
        assert error.code() is grpc.StatusCode.INTERNAL
        everything = f"{error.details()} {error.debug_error_string()} {error.trailing_metadata()}"
        assert "zxsecret" not in everything
        assert "Traceback" not in everything
        info = details_of(error)["ErrorInfo"]
        assert info.reason == "INTERNAL"
        assert info.metadata["error_id"] in caplog.text
        assert "zxsecret" in caplog.text


async def test_bytes_that_do_not_parse_are_a_typed_error() -> None:
    async with kit_server() as (_, servicer, client):
        for call in (
            client.unary("Call", b"\xff"),
            client.stream("Stream", b"\xff"),
            client.requests("Collect", [b"a", b"\xff"]),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert details_of(error)["ErrorInfo"].reason == "MALFORMED_REQUEST"
            assert [violation.field for violation in details_of(error)["BadRequest"].field_violations] == [""]
        assert servicer.entered == 0
        assert await client.unary("Call", b"still serving") == b"still serving"


async def test_a_message_over_the_limit_is_a_typed_error_without_retry_advice() -> None:
    async with kit_server() as (_, _, client):
        for call in (client.unary("Call", bytes(20_000_000)), client.requests("Chat", [bytes(20_000_000)])):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            details = details_of(error)
            assert details["ErrorInfo"].reason == "MESSAGE_TOO_LARGE"
            assert dict(details["ErrorInfo"].metadata) == {
                "message_bytes": "20000000",
                "max_message_bytes": str(16 * 1024 * 1024),
            }
            assert "RetryInfo" not in details


async def test_the_limit_itself_is_allowed() -> None:
    async with kit_server(ListenConfig(max_message_bytes=2000)) as (_, _, client):
        assert len(await client.unary("Call", bytes(2000))) == 2000
        assert (await failure(client.unary("Call", bytes(2001)))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_still_sends_gets_the_error_that_it_was_given() -> None:
    async with kit_server() as (_, servicer, client):
        servicer.outcome = raising(errors.QueueFull("why"))
        call = client.channel.stream_stream(f"/{NAME}/Chat")()
        for _ in range(50):
            await call.write(b"x")
            await asyncio.sleep(0)
        await call.done_writing()
        error = await failure(call)
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "why")


async def test_a_client_that_never_stops_sending_is_refused_all_the_same() -> None:
    async with kit_server() as (_, servicer, client):
        servicer.outcome = raising(errors.QueueFull("why"))
        call = client.channel.stream_stream(f"/{NAME}/Chat")()
        await call.write(b"x")
        error = await failure(call)
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "why")


async def test_a_message_over_the_transports_limit_is_resource_exhausted() -> None:
    async with kit_server(ListenConfig(max_message_bytes=1024, max_transport_message_bytes=4096)) as (_, _, client):
        assert (await failure(client.unary("Call", bytes(5000)))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await client.unary("Call", b"x") == b"x"


async def test_methods_nobody_wrote_are_unimplemented_with_details() -> None:
    from grpc_health.v1 import health_pb2_grpc  # a generated base class whose methods nobody overrides

    async with open_server(
        [Mount(health_pb2_grpc_alias(health_pb2_grpc), health_pb2_grpc.HealthServicer())], ListenConfig()
    ) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            for path in (
                "/test.Unwritten/Check",
                "/test.Unwritten/Watch",
                "/test.Unwritten/Nothing",
                "/no.Such/Method",
            ):
                error = await failure(channel.unary_unary(path)(b""))
                assert error.code() is grpc.StatusCode.UNIMPLEMENTED
                assert details_of(error)["ErrorInfo"].reason == "METHOD_NOT_IMPLEMENTED"


def health_pb2_grpc_alias(generated: Any) -> Any:
    """The generated registration under another service's name, beside the real health service."""

    class Renaming:
        def __init__(self, server: Any) -> None:
            self._server = server

        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            self._server.add_generic_rpc_handlers(handlers)

        def add_registered_method_handlers(self, _service: str, handlers: Any) -> None:
            self._server.add_registered_method_handlers("test.Unwritten", handlers)

    return lambda servicer, server: generated.add_HealthServicer_to_server(servicer, Renaming(server))


async def test_a_servicer_that_would_block_the_loop_is_refused_at_start() -> None:
    class Blocking(KitServicer):
        def Call(self, request: bytes, context: Any) -> bytes:  # type: ignore[override]
            return request

    with pytest.raises(TypeError, match="/Call: a servicer's methods are coroutines"):
        async with kit_server(servicer=Blocking()):
            pass


async def test_the_request_id_comes_back_and_reaches_the_log() -> None:
    async with kit_server() as (_, servicer, client):
        servicer.outcome = lambda _: request_id.get().encode()
        call = client.unary("Call", metadata=(("x-request-id", "given-1"),))
        assert await call == b"given-1"
        assert dict(await call.initial_metadata())["x-request-id"] == "given-1"

        call = client.stream("Stream", metadata=(("x-request-id", "bad id with spaces"),))
        received = [message async for message in call]
        made = dict(await call.initial_metadata())["x-request-id"]
        assert made != "bad id with spaces"
        assert received == [b"first", made.encode()]


async def test_a_call_that_fails_before_its_first_message_ends_in_trailers_only() -> None:
    async with kit_server() as (_, servicer, client):
        servicer.outcome = raising(errors.QueueFull("full"))
        error = await failure(client.unary("Call", metadata=(("x-request-id", "given-2"),)))
        assert "x-request-id" not in dict(error.initial_metadata())
        assert dict(error.trailing_metadata())["x-request-id"] == "given-2"


async def test_the_deadline_is_known_to_the_handler() -> None:
    async with kit_server() as (_, _, client):
        assert await client.unary("TimeLeft") == b"None"
        assert 5 < float(await client.unary("TimeLeft", timeout=60)) < 61  # gRPC rounds up on the wire


async def test_metrics_tell_the_true_codes(assert_eventually: Any) -> None:
    async with kit_server() as (server, servicer, client):
        await client.unary("Call")
        servicer.outcome = raising(errors.StaleEtag("stale"))
        await failure(client.unary("Call"))
        cancelled = client.stream("Hold")
        await cancelled.read()
        cancelled.cancel()
        assert (await failure(client.stream("Hold", timeout=1.0))).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await failure(client.channel.unary_unary("/no.Such/Method")(b""))
        await assert_eventually(lambda: len(server.calls) == 0)
        assert servicer.closed == 2
        text = await scrape(server.metrics_port)

    def count(method: str, code: str) -> str:
        return (
            f'rpc_server_call_duration_seconds_count{{rpc_method="{method}",rpc_response_status_code="{code}"}} 1.0\n'
        )

    assert count(f"{NAME}/Call", "OK") in text
    assert count(f"{NAME}/Call", "ABORTED") in text
    assert count(f"{NAME}/Hold", "CANCELLED") in text
    assert count(f"{NAME}/Hold", "DEADLINE_EXCEEDED") in text
    assert count("_OTHER", "UNIMPLEMENTED") in text
    assert f'slipstream_rpc_calls_running{{rpc_method="{NAME}/Hold"}} 0.0\n' in text


async def test_a_reader_that_stops_reading_loses_its_stream_and_nobody_else(assert_eventually: Any) -> None:
    async with kit_server(ListenConfig(write_timeout_s=0.3)) as (_, servicer, client):
        call = client.stream("Flood")
        await call.read()
        await assert_eventually(lambda: servicer.closed == 1)
        assert await client.unary("Call", b"fine") == b"fine"
        call.cancel()


async def test_a_call_ends_though_its_reader_takes_not_even_the_status(assert_eventually: Any) -> None:
    async with kit_server(ListenConfig(write_timeout_s=0.2)) as (server, servicer, client):
        call = client.stream("Flood")
        await call.read()
        await assert_eventually(lambda: servicer.closed == 1)
        await assert_eventually(lambda: len(server.calls) == 0)
        text = await scrape(server.metrics_port)
        counted = [line for line in text.splitlines() if line.startswith("rpc_server_call_duration_seconds_count{")]
        assert [line for line in counted if "Flood" in line and "RESOURCE_EXHAUSTED" in line], counted
        call.cancel()


async def test_a_stalled_loop_is_counted_and_logged(assert_eventually: Any, caplog: pytest.LogCaptureFixture) -> None:
    def stall(_request: bytes) -> bytes:
        time.sleep(0.5)
        return b"awake"

    async with kit_server() as (server, servicer, client):
        servicer.outcome = stall
        with caplog.at_level(logging.WARNING):
            assert await client.unary("Call") == b"awake"
            await assert_eventually(lambda: "the event loop stood still" in caplog.text)
        assert "in stall" in caplog.text
        text = await scrape(server.metrics_port)
        counted = next(line for line in text.splitlines() if line.startswith("slipstream_event_loop_stalls_total "))
        assert float(counted.split()[1]) >= 1  # more where the machine itself is busy


async def test_a_burst_of_streams_is_accepted_whole() -> None:
    async with kit_server() as (server, servicer, client):
        calls = [client.stream("Hold") for _ in range(2000)]
        firsts = await asyncio.gather(*(call.read() for call in calls))
        assert firsts == [b"begun"] * 2000
        assert len(server.calls) == 2000
        servicer.release.set()
        assert await asyncio.gather(*(call.read() for call in calls)) == [b"ended"] * 2000
        assert {await call.code() for call in calls} == {grpc.StatusCode.OK}
