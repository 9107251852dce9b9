"""Who comes in: tokens, TLS, and the channels that carry both on to other services."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.rpc.kit_doors import SERVING, bearer, failure, health_at, http_status
from tests.rpc.kit_service import KitClient, KitServicer, details_of, kit_server

from slipstream_server.config import ConfigError, ListenConfig
from slipstream_server.logs import request_id
from slipstream_server.rpc import tokens
from slipstream_server.rpc.channels import Peer, open_channel

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
