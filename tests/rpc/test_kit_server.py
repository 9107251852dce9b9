"""Ports and endings of the server: health, reflection, metrics, drain, signals, background tasks that die."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.rpc.kit_doors import NOT_SERVING, SERVICE_UNKNOWN, SERVING, failure, health_at, http_status
from tests.rpc.kit_service import NAME, KitClient, KitServicer, add_kit_servicer, details_of, kit_server

from slipstream_server.config import ConfigError, ListenConfig
from slipstream_server.rpc.server import Mount, RpcServer, open_server
from slipstream_server.rpc.service_runner import Service, announce, run_service

# Health, reflection, ports


class Readiness:
    """A readiness the test turns on and off."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[bool] = asyncio.Queue()

    async def __call__(self) -> AsyncIterator[bool]:
        while True:
            yield await self.changes.get()


async def test_health_follows_readiness_on_both_ports(assert_eventually: Any) -> None:
    ready = Readiness()
    mount = Mount(add_kit_servicer, KitServicer(), readiness=ready)
    async with open_server([mount], ListenConfig()) as server:
        for port in (server.port, server.probe_port):
            assert [await health_at(port, name) for name in ("", NAME)] == [NOT_SERVING] * 2
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watches = [stub.Watch(health_pb2.HealthCheckRequest(service=NAME)) for _ in range(2)]
            assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 2
            watches.pop().cancel()
            ready.changes.put_nowait(True)
            assert (await watches[0].read()).status == SERVING
            for port in (server.port, server.probe_port):
                assert [await health_at(port, name) for name in ("", NAME)] == [SERVING] * 2
            ready.changes.put_nowait(False)
            assert (await watches[0].read()).status == NOT_SERVING
            unknown = stub.Watch(health_pb2.HealthCheckRequest(service="no.Such"))
            assert (await unknown.read()).status == SERVICE_UNKNOWN
        assert (await failure(health_at(server.port, "no.Such"))).code() is grpc.StatusCode.NOT_FOUND
        assert (await failure(health_at(server.probe_port, "no.Such"))).code() is grpc.StatusCode.NOT_FOUND


async def test_the_probe_port_knows_nothing_but_health() -> None:
    async with kit_server() as (server, _, _):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.probe_port}") as channel:
            assert (await failure(KitClient(channel).unary("Call"))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_names_every_service() -> None:
    async with kit_server() as (_, _, client):
        answer = (
            await reflection_pb2_grpc.ServerReflectionStub(client.channel)
            .ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            .read()
        )
        names = {service.name for service in answer.list_services_response.service}
        assert names == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_the_metrics_port_serves_only_metrics() -> None:
    async with kit_server() as (server, _, _):
        assert await http_status(server.metrics_port) == 200
        assert await http_status(server.metrics_port, "/") == 404
        assert await http_status(server.metrics_port, "/../../etc/passwd") == 404


@pytest.mark.parametrize("key", ["port", "metrics_port", "health_port"])
async def test_a_port_in_use_is_named(key: str) -> None:
    async with kit_server() as (server, _, _):
        taken = server.probe_port if key == "health_port" else getattr(server, key)
        with pytest.raises(ConfigError, match=f"^{key}: cannot listen on 127.0.0.1:{taken}"):
            async with kit_server(ListenConfig(**{key: taken})):
                pass


async def test_health_answers_within_a_second_during_a_burst() -> None:
    async with kit_server() as (server, servicer, client):
        calls = [client.stream("Hold") for _ in range(2000)]
        reads = asyncio.gather(*(call.read() for call in calls))

        def probe() -> float:
            # In a thread, as a client elsewhere would be: the burst's own client keeps this loop busy.
            with grpc.insecure_channel(f"127.0.0.1:{server.probe_port}") as channel:
                begun_s = time.monotonic()
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
                return time.monotonic() - begun_s

        latencies_s = [await asyncio.to_thread(probe) for _ in range(3)]
        assert max(latencies_s) < 1.0
        await reads
        servicer.release.set()
        await asyncio.gather(*(call.read() for call in calls))


# Drain


async def test_a_drain_refuses_new_calls_and_lets_running_ones_finish() -> None:
    async with kit_server() as (server, servicer, client):
        running = [client.stream("Hold") for _ in range(20)]
        for call in running:
            assert await call.read() == b"begun"
        drain = asyncio.create_task(server.drain(30))
        await asyncio.sleep(0)
        for port in (server.port, server.probe_port):
            assert [await health_at(port, name) for name in ("", NAME)] == [NOT_SERVING] * 2
        error = await failure(client.unary("Call"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        details = details_of(error)
        assert details["ErrorInfo"].reason == "DRAINING"
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert not drain.done()
        servicer.release.set()
        assert [await call.read() for call in running] == [b"ended"] * 20
        assert {await call.code() for call in running} == {grpc.StatusCode.OK}
        await asyncio.wait_for(drain, 5)


async def test_what_outlives_the_grace_is_told_so() -> None:
    async with kit_server() as (server, servicer, client):
        running = [client.stream("Hold") for _ in range(5)]
        for call in running:
            await call.read()
        await asyncio.wait_for(server.drain(0.1), 5)
        for call in running:
            error = await failure(call.read())
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert details_of(error)["ErrorInfo"].reason == "DRAINING"
            assert "RetryInfo" in details_of(error)
        assert servicer.closed == 5
        assert len(server.calls) == 0


async def test_streams_that_only_watch_do_not_hold_a_drain() -> None:
    async with kit_server() as (server, _, client):
        watching = client.stream("WatchForever")
        await watching.read()
        await asyncio.wait_for(server.drain(60), 5)
        assert details_of(await failure(watching.read()))["ErrorInfo"].reason == "DRAINING"


# The runner


async def started(service: Service, listen: ListenConfig, **kwargs: Any) -> tuple[asyncio.Task[int], RpcServer]:
    serving: asyncio.Future[RpcServer] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_service(service, listen, on_serving=serving.set_result, **kwargs))
    await asyncio.wait((running, serving), return_when=asyncio.FIRST_COMPLETED)
    return running, serving.result()


def kit_as_service(servicer: KitServicer, **kwargs: Any) -> Service:
    return Service(name="kit", mounts=[Mount(add_kit_servicer, servicer)], **kwargs)


async def test_sigterm_under_load_drains_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], assert_eventually: Any
) -> None:
    servicer = KitServicer()
    cleaned = asyncio.Event()

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    running, server = await started(kit_as_service(servicer, background={"pump": background}), ListenConfig())
    announce("kit", "127.0.0.1", server)
    assert capsys.readouterr().out == (
        f"kit SERVING 127.0.0.1:{server.port} metrics={server.metrics_port} health={server.probe_port}\n"
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        client = KitClient(channel)
        calls = [client.stream("Hold") for _ in range(50)]
        for call in calls:
            await call.read()
        os.kill(os.getpid(), signal.SIGTERM)
        await assert_eventually(lambda: not server.health.is_serving())
        assert details_of(await failure(client.unary("Call")))["ErrorInfo"].reason == "DRAINING"
        assert not cleaned.is_set()
        servicer.release.set()
        assert [await call.read() for call in calls] == [b"ended"] * 50
    assert await asyncio.wait_for(running, 10) == 0
    assert cleaned.is_set()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_a_second_signal_ends_the_drain(assert_eventually: Any) -> None:
    servicer = KitServicer()
    running, server = await started(kit_as_service(servicer), ListenConfig(drain_grace_s=600))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = KitClient(channel).stream("Hold")
        await call.read()
        os.kill(os.getpid(), signal.SIGTERM)
        await assert_eventually(lambda: not server.health.is_serving())
        os.kill(os.getpid(), signal.SIGINT)
        assert details_of(await failure(call.read()))["ErrorInfo"].reason == "DRAINING"
    assert await asyncio.wait_for(running, 10) == 0


@pytest.mark.parametrize("returns", [True, False])
async def test_the_first_dead_background_task_stops_the_service(
    returns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    die = asyncio.Event()

    async def background() -> None:
        await die.wait()
        if not returns:
            raise RuntimeError("the pump broke")

    running, _ = await started(kit_as_service(KitServicer(), background={"pump": background}), ListenConfig())
    die.set()
    assert await asyncio.wait_for(running, 10) == 1
    assert "background task 'pump' has ended" in caplog.text
    assert ("the pump broke" in caplog.text) is not returns
