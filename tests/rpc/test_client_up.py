"""``slipstream up`` with a real service: the lines it prints, how it ends, and what it leaves."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

PORTS = (1, 1001, 2001)  # of chat, above the base port: calls, metrics, health


def free_base_port() -> int:
    """A base port above which the ports of chat are free."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            base = probe.getsockname()[1] - 1
        if 1024 < base < 60_000 and all(map(is_free, (base + offset for offset in PORTS))):
            return base
    raise AssertionError("no free ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def up(tmp_path):
    running = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "slipstream_client.cli", "up", "--data-dir", str(tmp_path), "--only", "chat"]
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen, last: str) -> list[str]:
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if lines[-1] == last:
            return lines
    raise AssertionError(f"ended after {lines}: {process.stderr.read()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_prints_serving_then_ready_and_ends_with_0(up, tmp_path, number):
    base = free_base_port()
    process = up("--base-port", str(base))
    assert read_until(process, "ready") == [f"chat      SERVING 127.0.0.1:{base + 1}", "ready"]
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    process.send_signal(number)
    assert process.wait(30) == 0
    assert not children[0].is_running()
    assert "chat has stopped" in (tmp_path / "logs" / "chat.log").read_text()


def test_as_json_each_change_is_an_object(up):
    base = free_base_port()
    process = up("--base-port", str(base), "--json")
    lines = [json.loads(line) for line in (process.stdout.readline(), process.stdout.readline())]
    assert (lines[0]["event"], lines[0]["service"], lines[0]["state"]) == ("service", "chat", "serving")
    assert (lines[1]["event"], lines[1]["addresses"]) == ("ready", {"chat": f"127.0.0.1:{base + 1}"})
    psutil.Process(process.pid).children()[0].kill()
    died = next(line for line in map(json.loads, process.stdout) if line["event"] == "died")
    assert (died["service"], died["exit_code"], died["restart_in_s"]) == ("chat", -9, 1.0)
    process.send_signal(signal.SIGTERM)
    assert [json.loads(line)["event"] for line in process.stdout][-2:] == ["stopping", "stopped"]
    assert process.wait(30) == 0


def test_a_killed_service_is_started_again_and_said_loudly(up):
    base = free_base_port()
    process = up("--base-port", str(base))
    read_until(process, "ready")
    psutil.Process(process.pid).children()[0].kill()
    said = read_until(process, f"chat      SERVING 127.0.0.1:{base + 1}")
    assert "chat died (signal 9); starting it again in 1 s" in said


def test_services_do_not_outlive_it(up):
    process = up("--base-port", str(free_base_port()))
    read_until(process, "ready")
    child = psutil.Process(process.pid).children()[0]
    os.kill(process.pid, signal.SIGKILL)
    child.wait(30)


def test_a_taken_port_is_named(up):
    base = free_base_port()
    with socket.create_server(("127.0.0.1", base + 1)):
        process = up("--base-port", str(base))
        assert process.wait(30) == 1
    assert f"chat cannot listen at 127.0.0.1:{base + 1}: Address already in use" in process.stderr.read()


def test_bad_settings_are_wrong_usage(up):
    process = up("--set", "chat.colour=red")
    assert process.wait(30) == 2
    assert "chat.colour: there is no such key" in process.stderr.read()
