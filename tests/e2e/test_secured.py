"""With tokens and TLS: nobody gets in without, and chat shows its own token to inference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from e2e.services import Running, environment, inference_flags, service
from e2e.stranger import COMPLETE, GENERATE, Refused, Stranger
from e2e.tiny_model import write_tiny_model

TOKEN, CHATS_TOKEN, STRANGERS = "token-of-ada", "token-of-chat", "token-of-nobody"
ASKED = {"text": "hello", "stopping": {"max_new_tokens": 2}}
SAID = {"messages": [{"role": "ROLE_USER", "content": "hello"}], "options": {"stopping": {"max_new_tokens": 2}}}


@dataclass(frozen=True, slots=True)
class Secured:
    """Both services with TLS and tokens: inference knows ada and chat, chat knows ada."""

    inference: Running
    chat: Running
    certificate: Path

    def channel(self, running: Running) -> grpc.Channel:
        return grpc.secure_channel(running.address, grpc.ssl_channel_credentials(self.certificate.read_bytes()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secured(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    name = ("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([*make, *name, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    everybody, only_ada, only_chat = (folder / name for name in ("everybody", "ada", "chat-token"))
    everybody.write_text(f"{TOKEN} ada\n{CHATS_TOKEN} chat\n")
    only_ada.write_text(f"{TOKEN} ada\n")
    only_chat.write_text(f"{CHATS_TOKEN} chat\n")
    tls = ("--tls-cert", str(certificate), "--tls-key", str(key))
    model = write_tiny_model(folder / "tiny")
    flags = inference_flags(model, "--batching", "null", *tls, "--token-file", str(everybody))
    async with service("inference", folder / "inference", *flags) as inference:
        upstream = ("--inference-address", inference.address, "--inference-token-file", str(only_chat))
        async with service("chat", folder / "chat", *tls, "--token-file", str(only_ada), *upstream) as chat:
            yield Secured(inference, chat, certificate)


@pytest.mark.parametrize("token", ["", STRANGERS, TOKEN + "x", "Bearer"])
def test_nothing_is_told_without_a_token_not_even_what_there_is(secured: Secured, token: str) -> None:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    for running in (secured.inference, secured.chat):
        with secured.channel(running) as channel:
            with pytest.raises(grpc.RpcError) as reflected:  # by reflection's own stub, which sends no token
                Stranger(channel).services()
            assert reflected.value.code() is grpc.StatusCode.UNAUTHENTICATED
            for method in (f"/{GENERATE}", f"/{COMPLETE}", "/grpc.health.v1.Health/Check", "/no.such.Service/Method"):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(b"", metadata=metadata, timeout=30)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert token not in (caught.value.details() or "") or not token


def test_with_a_token_and_tls_everything_answers(secured: Secured) -> None:
    for running, method, request in ((secured.inference, GENERATE, ASKED), (secured.chat, COMPLETE, SAID)):
        with secured.channel(running) as channel:
            trusted = grpc.intercept_channel(channel, _WithToken(TOKEN))
            answer = Stranger(trusted).call(method, request)
            assert answer.usage.completion_tokens == 2
    # chat is known to inference by its own token, and to its clients by theirs
    with secured.channel(secured.chat) as channel, pytest.raises((Refused, grpc.RpcError)):
        Stranger(grpc.intercept_channel(channel, _WithToken(CHATS_TOKEN))).call(COMPLETE, SAID)


def test_plaintext_is_not_spoken_and_secrets_are_not_logged(secured: Secured) -> None:
    with grpc.insecure_channel(secured.inference.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{GENERATE}")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    for running in (secured.inference, secured.chat):
        log = running.log.read_text()
        assert not any(secret in log for secret in (TOKEN, CHATS_TOKEN, STRANGERS, "PRIVATE KEY"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_beyond_loopback_asks_for_both(secured: Secured, tmp_path: Path, host: str) -> None:
    def refused(*flags: str) -> str:
        command = [sys.executable, "-m", "slipstream_server.cli", "chat", "--data-dir", str(tmp_path), "--host", host]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, env=environment())
        assert done.returncode == 2, done.stderr
        return done.stderr

    token = ("--token-file", str(secured.certificate))
    tls = ("--tls-cert", str(secured.certificate), "--tls-key", str(secured.certificate))
    for flags in ((), token, tls):
        assert "insecure_listen" in refused("--base-port", "0", *flags)


class _WithToken(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds the token to calls and to reflection's streams."""

    def __init__(self, token: str) -> None:
        self._metadata = [("authorization", f"Bearer {token}")]

    def intercept_unary_unary(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return continuation(self._with_token(details), request)

    def intercept_stream_stream(self, continuation, details, requests):  # type: ignore[no-untyped-def]
        return continuation(self._with_token(details), requests)

    def _with_token(self, details: grpc.ClientCallDetails) -> grpc.ClientCallDetails:
        return _Details(details.method, details.timeout, self._metadata, details.credentials)


class _Details(grpc.ClientCallDetails):
    def __init__(self, method, timeout, metadata, credentials):  # type: ignore[no-untyped-def]
        self.method, self.timeout, self.metadata, self.credentials = method, timeout, metadata, credentials
        self.wait_for_ready = self.compression = None
