"""The door to the server: flags become settings, mistakes are said by name."""

import pytest

from slipstream_server import cli
from slipstream_server.config import ConfigError


@pytest.mark.parametrize("service", ["nonsense", "../inference", ""])
def test_unknown_services_are_refused(service, capsys):
    assert cli.serve(service, []) == 2
    assert repr(service) in capsys.readouterr().err


def test_bad_values_are_refused_by_key_before_anything_starts(capsys):
    assert cli.serve("inference", ["--max-batch-size", "0", "--set", "common.base_port=x"]) == 2
    shown = capsys.readouterr().err
    assert "inference.max_batch_size" in shown
    assert "common.base_port" in shown


def test_flags_of_another_service_are_unknown(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.serve("chat", ["--max-batch-size", "3"])
    assert ended.value.code == 2


def test_help_lists_every_setting_of_the_service(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.serve("inference", ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for flag in ("--model", "--device", "--data-dir", "--tls-cert", "--max-queue-delay-ms"):
        assert flag in shown


def test_assignments_become_flags():
    found = cli.flags_from(["inference.models=a", "inference.models=b=/x", "common.base_port=7"])
    assert found == {"inference.models": ("a", "b=/x"), "common.base_port": "7"}
    with pytest.raises(ConfigError, match="SECTION"):
        cli.flags_from(["port=7"])


def test_settings_are_shown_with_their_source(tmp_path, monkeypatch):
    file = tmp_path / "slipstream.toml"
    file.write_text("[inference]\nmax_batch_size = 7\n")
    monkeypatch.setenv("SLIPSTREAM_LOG_LEVEL", "DEBUG")
    shown = {key: (value, source) for key, value, source, _, _ in cli.check_config(file)}
    assert shown["inference.max_batch_size"] == ("7", "file")
    assert shown["common.log_level"] == ("DEBUG", "environment")
    assert shown["common.base_port"] == ("50051", "default")


def test_the_clients_own_variables_do_not_disturb_the_server(tmp_path, monkeypatch):
    for name in ("ADDRESS", "INFERENCE_ADDRESS", "CHAT_ADDRESS", "TOKEN", "CA_CERT", "TLS", "TIMEOUT_S", "CLIENT_CERT"):
        monkeypatch.setenv(f"SLIPSTREAM_{name}", "1")
    assert cli.check_config(None)
