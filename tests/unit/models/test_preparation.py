"""A preparation that nobody waits for any more, that its caller gives up, or whose caller is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from slipstream_server.models.preparation import _run, run_preparation, run_sentiment_recipe
from slipstream_server.models.with_parent import import_path

Eventually = Callable[..., Awaitable[None]]


class _GivenUpError(Exception):
    pass


def _programs(folder: Path) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if str(folder) in " ".join(child.cmdline())]


@pytest.mark.parametrize("program", ["prepare", "sentiment"])
def test_a_heartbeat_that_raises_ends_the_subprocess_and_the_call(tmp_path: Path, program: str) -> None:
    seen: list[int] = []

    def heartbeat(fraction: float) -> None:
        assert fraction == 0.0
        seen.append(len(_programs(tmp_path)))
        raise _GivenUpError

    began_s = time.monotonic()
    with pytest.raises(_GivenUpError):
        if program == "prepare":
            run_preparation(tmp_path / "source", tmp_path / "target", heartbeat=heartbeat)
        else:
            run_sentiment_recipe(tmp_path / "base", tmp_path / "data", tmp_path / "target", heartbeat=heartbeat)
    assert seen == [1]
    assert not _programs(tmp_path)
    assert time.monotonic() - began_s < 10


TELLER = """
import sys
print('{"fraction": 0.25}', flush=True)
print('{"fraction": 0.5}', flush=True)
print('{"fraction": 0.7', end="", flush=True)  # half a line
sys.stdin = open(sys.argv[1])
sys.stdin.read()
print('5}', flush=True)
print('{"answer": "done"}', flush=True)
"""


def test_what_a_program_says_of_its_progress_reaches_the_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teller.py").write_text(TELLER)
    os.mkfifo(tmp_path / "gate")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen: list[float] = []

    def heartbeat(fraction: float) -> None:
        seen.append(fraction)
        if fraction == 0.5:
            (tmp_path / "gate").write_text("")

    assert _run("teller", [str(tmp_path / "gate")], heartbeat) == {"answer": "done"}
    assert 0.5 in seen
    assert 0.7 not in seen


CALLER = """
import pathlib, sys
from slipstream_server.models.preparation import _run
_run("sleeper", sys.argv[1:], lambda fraction: None)
"""
SLEEPER = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("")
time.sleep(99)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a program with its parent")
async def test_a_program_dies_with_the_process_that_waits_for_it(tmp_path: Path, assert_eventually: Eventually) -> None:
    """Killed, the caller can end nothing; a conversion may take an hour."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    begun = tmp_path / "begun"
    path = os.pathsep.join([import_path(), str(tmp_path)])
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(begun)], env={**os.environ, "PYTHONPATH": path})
    try:
        await assert_eventually(begun.exists)
        (program,) = psutil.Process(caller.pid).children()
        caller.kill()
        caller.wait()
        await assert_eventually(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE)
    finally:
        caller.kill()
