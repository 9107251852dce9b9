"""The processes of one machine: started, watched, started again, and none left at the end."""

import asyncio
import os
import signal

import pytest

from slipstream_client.cli import supervisor
from slipstream_client.cli.supervisor import Program, Supervisor

PROGRAM = """
import os, pathlib, signal, sys, time
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
with (folder / "pids").open("a") as pids:
    pids.write(f"{os.getpid()}\\n")
print("hello from", kind, flush=True)
if kind == "usage":
    sys.exit(2)
if kind == "dies":
    sys.exit(3)
if kind == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(folder / "up").touch()
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "fake_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)

    def make(kind: str) -> Program:
        arguments = ["fake_program", str(tmp_path), kind]
        return Program(name=kind, arguments=arguments, log_file=tmp_path / "logs" / f"{kind}.log")

    return make


def pids(tmp_path) -> list[int]:
    file = tmp_path / "pids"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def eventually(condition, timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_stops_gracefully_when_asked(program, tmp_path):
    deaths, stops, stopping = [], [], asyncio.Event()
    running = asyncio.create_task(
        Supervisor([program("good")], deaths.append).run(stopping, grace_s=10, on_stopping=lambda: stops.append(1))
    )
    await eventually((tmp_path / "up").exists)
    stopping.set()
    assert await running == 0
    assert (deaths, stops) == ([], [1])
    assert not any(map(is_alive, pids(tmp_path)))
    assert (tmp_path / "logs" / "good.log").read_text() == "hello from good\n"


@pytest.mark.parametrize("hurry", [False, True])
async def test_kills_what_does_not_end_by_itself(program, tmp_path, hurry):
    stopping = asyncio.Event()
    grace_s = 60.0 if hurry else 0.3
    running = asyncio.create_task(
        Supervisor([program("stubborn")], print).run(stopping, grace_s=grace_s, on_stopping=lambda: None)
    )
    await eventually((tmp_path / "up").exists)
    stopping.set()
    if hurry:  # a second Ctrl-C
        await eventually(lambda: not stopping.is_set())
        stopping.set()
    assert await asyncio.wait_for(running, 15) == 0
    assert not any(map(is_alive, pids(tmp_path)))


async def test_starts_a_killed_program_again(program, tmp_path):
    deaths, stopping = [], asyncio.Event()
    running = asyncio.create_task(
        Supervisor([program("good")], deaths.append).run(stopping, grace_s=10, on_stopping=lambda: None)
    )
    await eventually((tmp_path / "up").exists)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    await eventually(lambda: len(pids(tmp_path)) == 2)
    stopping.set()
    assert await running == 0
    assert [(death.exit_code, death.restart_in_s) for death in deaths] == [(-9, 0.01)]


async def test_gives_up_after_deaths_that_follow_each_other(program, tmp_path):
    deaths = []
    supervised = Supervisor([program("dies"), program("good")], deaths.append)
    assert await supervised.run(asyncio.Event(), grace_s=10, on_stopping=lambda: None) == 1
    assert [death.restart_in_s for death in deaths] == [0.01, 0.02, 0.04, 0.08, None]
    assert {death.tail for death in deaths} == {("hello from dies",)}  # each of its own run only
    assert not any(map(is_alive, pids(tmp_path)))


async def test_gives_up_at_once_on_wrong_usage(program):
    deaths = []
    supervised = Supervisor([program("usage")], deaths.append)
    assert await supervised.run(asyncio.Event(), grace_s=10, on_stopping=lambda: None) == 1
    assert [(death.exit_code, death.restart_in_s) for death in deaths] == [(2, None)]


def test_a_large_log_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 4)
    file = tmp_path / "logs" / "x.log"
    for text in (b"first", b"second"):
        with supervisor.open_log(file) as log:
            log.write(text)
    assert file.read_bytes() == b"second"
    assert file.with_name("x.log.1").read_bytes() == b"first"
