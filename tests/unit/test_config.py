"""Settings: precedence, sources, and problems that name key, value and range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from slipstream_server.config import ConfigError, ListenConfig, describe, is_loopback, load_settings


def problems(**kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_settings(**kwargs)
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "slipstream.toml"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[inference]\nmax_batch_size = 2\nmax_batch_tokens = 200\nthreads = 2\n")
    environment = {"SLIPSTREAM_INFERENCE_MAX_BATCH_SIZE": "3", "SLIPSTREAM_INFERENCE_MAX_BATCH_TOKENS": "300"}
    settings = load_settings(file=file, environment=environment, flags={"inference.max_batch_size": 4})
    inference = settings.inference
    assert (inference.max_batch_size, inference.max_batch_tokens, inference.threads) == (4, 300, 2)
    keys = ("max_batch_size", "max_batch_tokens", "threads", "device")
    sources = [settings.sources[f"inference.{key}"] for key in keys]
    assert sources == ["flag", "environment", "file", "default"]


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    settings = load_settings(environment={"SLIPSTREAM_LOG_LEVEL": "ERROR"}, flags={"common.log_level": None})
    assert settings.common.log_level == "ERROR"


def test_the_file_is_found_in_the_working_directory_or_by_variable(tmp_path: Path) -> None:
    write(tmp_path, "[common]\nbase_port = 6000\n")
    assert load_settings().common.base_port == 6000
    other = tmp_path / "other.toml"
    other.write_text("[common]\nbase_port = 7000\n")
    assert load_settings(environment={"SLIPSTREAM_CONFIG": str(other)}).common.base_port == 7000


def test_values_get_the_type_of_their_key(tmp_path: Path) -> None:
    environment = {
        "SLIPSTREAM_INSECURE_LISTEN": "yes",
        "SLIPSTREAM_DRAIN_GRACE_S": "1.5",
        "SLIPSTREAM_TOKEN_FILE": "~/tokens",
        "SLIPSTREAM_INFERENCE_MODELS": "a=x/y, b",
        "SLIPSTREAM_CHAT_PORT": "",
    }
    settings = load_settings(environment=environment)
    assert settings.common.insecure_listen is True
    assert settings.common.drain_grace_s == 1.5
    assert settings.common.token_file == Path.home() / "tokens"
    assert settings.inference.models == ("a=x/y", "b")
    assert settings.chat.port is None


def test_unknown_keys_are_errors_that_name_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path, "[inference]\nmax_batchsize = 2\n[infrence]\nx = 1\n")
    found = problems(file=file, environment={"SLIPSTREAM_INFERENCE_DTPYE": "float32"}, flags={"common.hots": "x"})
    assert found == (
        "SLIPSTREAM_INFERENCE_DTPYE: there is no such setting; did you mean 'INFERENCE_DTYPE'?",
        "[infrence]: there is no such section; did you mean 'inference'?",
        "common.hots: there is no such key; did you mean 'host'?",
        "inference.max_batchsize: there is no such key; did you mean 'max_batch_size'?",
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("common.base_port", "70000", "common.base_port (flag): '70000' is not allowed; allowed: 0 to 60000"),
        ("common.base_port", "x", "common.base_port (flag): 'x' is no whole number"),
        ("common.drain_grace_s", "nan", "common.drain_grace_s (flag): 'nan' is not allowed; allowed: 0 to 86400"),
        ("common.drain_grace_s", "-1", "common.drain_grace_s (flag): '-1' is not allowed; allowed: 0 to 86400"),
        ("common.insecure_listen", "maybe", "common.insecure_listen (flag): 'maybe' is not true or false"),
        ("common.log_format", "x", "common.log_format (flag): 'x' is not allowed; allowed: one of auto, json, text"),
        ("inference.memory_fraction", 1.5, "inference.memory_fraction (flag): 1.5 is not allowed; allowed: 0.01 to 1"),
        ("inference.max_step_tokens", 0, "inference.max_step_tokens (flag): 0 is not allowed; allowed: 1 to 1048576"),
        ("inference.max_batch_size", 2.5, "inference.max_batch_size (flag): 2.5 is no whole number"),
        ("inference.max_batch_size", True, "inference.max_batch_size (flag): True is no whole number"),
        ("inference.models", 3, "inference.models (flag): 3 is no list"),
    ],
)  # fmt: skip
def test_a_bad_value_names_key_value_and_range(key: str, value: object, expected: str) -> None:
    assert problems(flags={key: value}) == (expected,)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, '[common]\nbase_port = "x"\n[chat]\nport = -1\n')
    assert len(problems(file=file)) == 2


@pytest.mark.parametrize("text", ["[common\n", "common = 3\n", "[[common]]\n"])
def test_a_broken_file_is_an_error(tmp_path: Path, text: str) -> None:
    assert problems(file=write(tmp_path, text))


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read" in problems(file=tmp_path / "none.toml")[0]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "10.0.0.1", ""])
def test_listening_beyond_loopback_needs_tls_and_tokens(host: str) -> None:
    only_tokens: dict[str, object] = {"common.host": host, "common.token_file": "tokens"}
    both = only_tokens | {"common.tls_cert": "cert.pem", "common.tls_key": "key.pem"}
    assert any("insecure_listen" in problem for problem in problems(flags={"common.host": host}))
    assert any("insecure_listen" in problem for problem in problems(flags=only_tokens))
    assert load_settings(flags=both).common.host == host
    assert load_settings(flags={"common.host": host, "common.insecure_listen": True}).common.insecure_listen


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_neither(host: str) -> None:
    assert is_loopback(host)
    assert load_settings(flags={"common.host": host}).common.host == host


def test_contradictions_are_found() -> None:
    assert "give both or neither" in problems(flags={"common.tls_cert": "cert.pem"})[0]
    assert "needs tls_cert" in problems(flags={"common.tls_client_ca": "ca.pem"})[0]
    assert "max_message_bytes" in problems(flags={"common.max_message_bytes": 1 << 30})[0]
    assert problems(flags={"chat.port": 50051}) == (
        "chat.port: 50051 is already inference.port",
        "chat.metrics_port: 51051 is already inference.metrics_port",
        "chat.health_port: 52051 is already inference.health_port",
    )
    assert "at most 65535" in problems(flags={"chat.port": 65000})[0]


def test_ports_follow_from_the_base_port() -> None:
    settings = load_settings()
    ports = {
        service: (listen.port, listen.metrics_port, listen.health_port)
        for service, listen in ((s, settings.listen(s)) for s in ("inference", "chat", "training", "adapters"))
    }
    assert ports == {
        "inference": (50051, 51051, 52051),
        "chat": (50052, 51052, 52052),
        "training": (50053, 51053, 52053),
        "adapters": (50054, 51054, 52054),
    }
    free = load_settings(flags={"common.base_port": 0}).listen("chat")
    assert (free.port, free.metrics_port, free.health_port) == (0, 0, 0)
    own = load_settings(flags={"chat.port": 9000, "chat.metrics_port": 9500}).listen("chat")
    assert (own.port, own.metrics_port, own.health_port) == (9000, 9500, 11000)


def test_a_service_is_reached_at_an_address_that_connects() -> None:
    def reach(host: str) -> str:
        return load_settings(flags={"common.host": host, "common.insecure_listen": True}).address_of("chat")

    assert reach("127.0.0.1") == reach("0.0.0.0") == "127.0.0.1:50052"
    assert reach("::1") == "[::1]:50052"


def test_listen_takes_the_common_settings_over() -> None:
    listen = load_settings(flags={"common.drain_grace_s": 7, "common.token_file": "tokens"}).listen("training")
    assert (listen.drain_grace_s, listen.token_file, listen.host) == (7.0, Path("tokens"), "127.0.0.1")
    assert dataclasses.replace(listen, port=0, metrics_port=0, health_port=0, drain_grace_s=30.0, token_file=None) == (
        ListenConfig()
    )


def test_what_kubernetes_tells_of_its_services_is_not_ours() -> None:
    links = {
        "SLIPSTREAM_CHAT_PORT": "tcp://10.0.0.7:50052",
        "SLIPSTREAM_CHAT_PORT_50052_TCP": "tcp://10.0.0.7:50052",
        "SLIPSTREAM_CHAT_PORT_50052_TCP_PROTO": "tcp",
        "SLIPSTREAM_CHAT_PORT_50052_TCP_PORT": "50052",
        "SLIPSTREAM_CHAT_PORT_50052_TCP_ADDR": "10.0.0.7",
        "SLIPSTREAM_CHAT_SERVICE_HOST": "10.0.0.7",
        "SLIPSTREAM_CHAT_SERVICE_PORT": "50052",
        "SLIPSTREAM_CHAT_SERVICE_PORT_GRPC": "50052",
        "SLIPSTREAM_TARGET": "localhost:50051",
    }
    assert load_settings(environment=links).chat.port is None


def test_every_key_is_described_and_its_default_is_allowed() -> None:
    described = list(describe())
    assert {key for key, *_ in described} == set(load_settings().sources)
    for key, about, default, bounds in described:
        assert about, key
        values = default if isinstance(default, tuple) else (default,)
        assert all(bounds.allow(value) for value in values), key
