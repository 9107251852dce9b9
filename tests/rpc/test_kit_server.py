"""Doors and endings of the server: tokens, TLS, health, reflection, metrics, drain, signals, channels onward."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.rpc.kit_service import NAME, KitClient, KitServicer, add_kit_servicer, details_of, kit_server

from slipstream_server.config import ConfigError, ListenConfig
from slipstream_server.logs import request_id
from slipstream_server.rpc import tokens
from slipstream_server.rpc.channels import Peer, open_channel
from slipstream_server.rpc.server import Mount, RpcServer, open_server
from slipstream_server.rpc.service_runner import Service, announce, run_service

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def health_at(port: int, service: str = "") -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


# Tokens


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tokens, "_CHECK_INTERVAL_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text("# who may call\nfirst-token alice\n\nsecond-token\n")
    return path


async def test_a_call_needs_a_token_the_file_holds(token_file: Path) -> None:
    async with kit_server(ListenConfig(token_file=token_file)) as (_, servicer, client):
        for metadata in (
            (),
            bearer("wrong"),
            bearer(""),
            (("authorization", "first-token"),),
            bearer("first-token alice"),
        ):
            error = await failure(client.unary("Call", metadata=metadata))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert details_of(error)["ErrorInfo"].reason == "UNAUTHENTICATED"
        assert servicer.entered == 0
        assert await client.unary("WhoAmI", metadata=bearer("first-token")) == b"alice"
        unnamed = await client.unary("WhoAmI", metadata=bearer("second-token"))
        assert unnamed.startswith(b"token-")
        assert b"second" not in unnamed


async def test_without_a_token_nothing_is_told_not_even_which_methods_exist(token_file: Path) -> None:
    async with kit_server(ListenConfig(token_file=token_file)) as (server, _, client):
        assert (await failure(client.unary("NoSuchMethod"))).code() is grpc.StatusCode.UNAUTHENTICATED
        reflected = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert (await failure(reflected.read())).code() is grpc.StatusCode.UNAUTHENTICATED
        stub = health_pb2_grpc.HealthStub(client.channel)
        assert (await failure(stub.Check(health_pb2.HealthCheckRequest()))).code() is grpc.StatusCode.UNAUTHENTICATED
        assert await health_at(server.probe_port) == SERVING
        assert await http_status(server.metrics_port) == 401
        assert await http_status(server.metrics_port, token="wrong") == 401
        assert await http_status(server.metrics_port, token="first-token") == 200


async def test_the_token_file_is_read_again_when_it_changes(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with kit_server(ListenConfig(token_file=token_file)) as (_, _, client):
        token_file.write_text("third-token carol\n")
        assert await client.unary("WhoAmI", metadata=bearer("third-token")) == b"carol"
        assert (
            await failure(client.unary("Call", metadata=bearer("first-token")))
        ).code() is grpc.StatusCode.UNAUTHENTICATED
        token_file.unlink()
        assert await client.unary("WhoAmI", metadata=bearer("third-token")) == b"carol"
        token_file.write_text("a b c d\n")
        assert await client.unary("WhoAmI", metadata=bearer("third-token")) == b"carol"
        token_file.write_text("fourth-token\n")
        assert (
            await failure(client.unary("Call", metadata=bearer("third-token")))
        ).code() is grpc.StatusCode.UNAUTHENTICATED
    assert "a b c d" not in caplog.text


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"one two three\n", b"\xff\xfe", "tökén\n".encode()])
async def test_a_token_file_that_cannot_be_used_stops_the_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="token_file"):
        async with kit_server(ListenConfig(token_file=path)):
            pass


async def http_status(port: int, path: str = "/metrics", token: str | None = None) -> int:
    def get() -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    return await asyncio.to_thread(get)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    subprocess.run([*command.split(), *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


async def test_tls_on_the_main_and_the_metrics_port_but_not_for_probes(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with kit_server(ListenConfig(tls_cert=cert, tls_key=key)) as (server, _, plaintext):
        assert (await failure(plaintext.unary("Call", timeout=2))).code() is not grpc.StatusCode.OK
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
            assert await KitClient(channel).unary("Call", b"secret") == b"secret"
        assert await health_at(server.probe_port) == SERVING

        def scrape() -> int:
            trust = ssl.create_default_context(cafile=str(cert))
            with urllib.request.urlopen(f"https://localhost:{server.metrics_port}/metrics", context=trust) as answer:
                return int(answer.status)

        assert await asyncio.to_thread(scrape) == 200


async def test_client_certificates_are_asked_for_where_configured(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    listen = ListenConfig(tls_cert=cert, tls_key=key, tls_client_ca=cert)
    async with kit_server(listen) as (server, _, _):
        bare = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", bare) as channel:
            assert (await failure(KitClient(channel).unary("Call", timeout=2))).code() is not grpc.StatusCode.OK
        shown = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", shown) as channel:
            assert await KitClient(channel).unary("Call", b"x") == b"x"


async def test_tls_files_that_are_none_stop_the_start(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    with pytest.raises(ConfigError):
        async with kit_server(ListenConfig(tls_cert=bad, tls_key=bad)):
            pass
    with pytest.raises(ConfigError, match="tls_key"):
        async with kit_server(ListenConfig(tls_cert=tmp_path / "none", tls_key=tmp_path / "none")):
            pass


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


# Channels between services


async def test_a_channel_carries_token_request_id_and_deadline_on(token_file: Path) -> None:
    async with kit_server(ListenConfig(token_file=token_file)) as (behind, _, _):
        peer = Peer(address=f"127.0.0.1:{behind.port}", token_file=token_file)
        async with open_channel(peer) as onward:
            upstream = KitClient(onward)

            class Front(KitServicer):
                async def Call(self, request: bytes, context: Any) -> bytes:
                    call = upstream.unary(request.decode())
                    answer = await call
                    assert dict(await call.initial_metadata())["x-request-id"] == request_id.get()
                    return bytes(answer)

                async def Stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
                    async for message in upstream.stream("Stream"):
                        yield message

            async with kit_server(servicer=Front()) as (_, _, client):
                assert await client.unary("Call", b"WhoAmI") == b"alice"
                assert 10 < float(await client.unary("Call", b"TimeLeft", timeout=30)) < 31
                assert await client.unary("Call", b"TimeLeft") == b"None"
                assert [m async for m in client.stream("Stream")] == [b"first", b""]
                refused = await failure(client.unary("Call", b"NoSuchMethod"))
                assert details_of(refused)["ErrorInfo"].reason == "METHOD_NOT_IMPLEMENTED"
