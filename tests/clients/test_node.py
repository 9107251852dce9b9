"""The Node client against live services: what it prints, and how it says what went wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.clients.services import CONTEXT_TOKENS, WORD, RunningService, prompt_tokens, running_service, save_model

pytestmark = pytest.mark.clients

NODE_CLIENT = Path(__file__).resolve().parents[2] / "clients" / "node"
STREAM_COMPLETE = "slipstream.chat.v1.ChatService/StreamComplete"
TIMEOUT_S = 60
ENDLESS_TOKENS = 40_000_000

Eventually = Callable[..., Awaitable[None]]


@pytest.fixture(scope="module", autouse=True)
def node_packages() -> None:
    """What package-lock.json names, exactly."""
    assert shutil.which("node"), "Node 20 or newer is needed"
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE_CLIENT, check=True, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "funny")


@pytest.fixture(scope="module")
def chat(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("services")
    with running_service("inference", folder / "inference", "--model", str(model), "--batching", "null") as inference:
        with running_service("chat", folder / "chat", "--inference-address", inference.address) as service:
            yield service


def command(address: str, *arguments: str) -> list[str]:
    return ["node", "chat.mjs", "--address", address, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's, without settings of a Slipstream of the person who runs the tests."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SLIPSTREAM_")} | more


def run(words: Sequence[str], stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=NODE_CLIENT,
        env=environment(**variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_an_answer_is_streamed_to_stdout_and_counted(chat: RunningService) -> None:
    ended = run(command(chat.address, "--system", "Be funny.", "--max-new-tokens", "5", "Tell", "me"))
    assert (ended.returncode, ended.stdout) == (0, WORD * 5 + "\n"), ended.stderr
    cost = prompt_tokens(("system", "Be funny."), ("user", "Tell me"))
    assert ended.stderr == f"[length: {cost} tokens in, 5 out]\n"


def test_lines_of_stdin_are_turns_of_one_conversation(chat: RunningService) -> None:
    ended = run(command(chat.address, "--max-new-tokens", "2"), stdin="one\n\ntwo\n")
    assert (ended.returncode, ended.stdout) == (0, f"{WORD * 2}\n{WORD * 2}\n"), ended.stderr
    first = prompt_tokens(("user", "one"))
    second = prompt_tokens(("user", "one"), ("assistant", WORD * 2), ("user", "two"))
    assert re.findall(r"(\d+) tokens in", ended.stderr) == [str(first), str(second)]


async def test_text_comes_while_the_answer_is_produced_and_ctrl_c_frees_the_service(
    chat: RunningService, assert_eventually: Eventually
) -> None:
    cancelled_before = chat.calls(STREAM_COMPLETE, "CANCELLED")
    process = subprocess.Popen(
        command(chat.address, "--max-new-tokens", str(ENDLESS_TOKENS), "hello"),
        cwd=NODE_CLIENT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # communicate() would pass over what a buffer holds
    )
    assert process.stdout is not None
    begin = process.stdout.read(len(WORD))
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=TIMEOUT_S)
    text = (begin + rest).decode()
    assert process.returncode == 130, said
    assert said.decode() == "[cancelled]\n"
    count = text.count(WORD)
    assert text == WORD * count + "\n"
    assert 0 < count < ENDLESS_TOKENS
    await assert_eventually(lambda: chat.calls(STREAM_COMPLETE, "CANCELLED") == cancelled_before + 1)


@pytest.mark.parametrize(
    ("flags", "code_and_reason", "named"),
    [
        (("--max-new-tokens=-1",), "INVALID_ARGUMENT INVALID_FIELD", "options.stopping.max_new_tokens: -1"),
        (("--model", "nobody"), "NOT_FOUND MODEL_NOT_FOUND", "nobody"),
        (("--model", "Not An Id"), "INVALID_ARGUMENT INVALID_FIELD", "model: "),
        (("--max-new-tokens", str(CONTEXT_TOKENS)), "INVALID_ARGUMENT PROMPT_TOO_LONG", str(CONTEXT_TOKENS)),
    ],
)
def test_a_bad_request_is_answered_with_its_reason_and_what_is_bad(
    chat: RunningService, flags: Sequence[str], code_and_reason: str, named: str
) -> None:
    ended = run(command(chat.address, *flags, "hello"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"{code_and_reason}: "), ended.stderr
    assert ended.stderr.count(named) == 1, ended.stderr


def test_a_failed_turn_does_not_end_a_conversation(chat: RunningService) -> None:
    ended = run(command(chat.address, "--max-new-tokens", "1"), stdin="hel\0lo\nhello\n")
    assert (ended.returncode, ended.stdout) == (0, f"{WORD}\n"), ended.stderr
    assert ended.stderr.startswith("INVALID_ARGUMENT INVALID_FIELD: ")


def test_a_deadline_and_an_absent_service_are_named(chat: RunningService) -> None:
    late = run(command(chat.address, "--timeout-s", "0.5", "--max-new-tokens", str(ENDLESS_TOKENS), "hello"))
    assert (late.returncode, late.stderr.split()[0].rstrip(":")) == (1, "DEADLINE_EXCEEDED"), late.stderr
    absent = run(command("127.0.0.1:1", "hello"))
    assert (absent.returncode, absent.stderr.split(":")[0]) == (1, "UNAVAILABLE")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--bogus",), "--bogus"),
        (("--max-new-tokens", "many", "hello"), "--max-new-tokens"),
        (("--timeout-s", "0", "hello"), "timeout"),
        (("--token-file", "absent", "hello"), "absent"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_sent(arguments: Sequence[str], complaint: str) -> None:
    ended = run(command("127.0.0.1:1", *arguments))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert complaint in ended.stderr


def test_tokens_over_tls_by_flags_and_by_variables(model: Path, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    tokens = tmp_path / "tokens"
    tokens.write_text("# who may call\ns3cret-1 node\n")
    protected = ("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(tokens))
    serve = ("--model", str(model), "--batching", "null", *protected)
    with running_service("inference", tmp_path / "inference", *serve) as inference:
        upstream = ("--inference-address", inference.address)
        with running_service("chat", tmp_path / "chat", *upstream, *protected) as chat:
            # By name: TLS has none for an address.
            address = chat.address.replace("127.0.0.1", "localhost")
            ask = command(address, "--max-new-tokens", "1", "hello")
            by_flags = run([*ask, "--ca-cert", str(cert), "--token-file", str(tokens)])
            assert (by_flags.returncode, by_flags.stdout) == (0, f"{WORD}\n"), by_flags.stderr
            by_variables = run(
                ["node", "chat.mjs", "--max-new-tokens", "1", "hello"],
                SLIPSTREAM_CHAT_ADDRESS=address,
                SLIPSTREAM_CA_CERT=str(cert),
                SLIPSTREAM_TOKEN="s3cret-1",
            )
            assert (by_variables.returncode, by_variables.stdout) == (0, f"{WORD}\n"), by_variables.stderr
            stranger = run([*ask, "--ca-cert", str(cert)], SLIPSTREAM_TOKEN="guessed")
            assert (stranger.returncode, stranger.stdout) == (1, "")
            assert stranger.stderr.startswith("UNAUTHENTICATED UNAUTHENTICATED: ")
            assert run([*ask, "--token-file", str(tokens)]).stderr.startswith("UNAVAILABLE: ")


def self_signed(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "tls.crt", folder / "tls.key"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    files = ("-keyout", str(key), "-out", str(cert))
    subprocess.run(["openssl", "req", "-x509", *curve, *subject, *files], check=True, capture_output=True)
    return cert, key
