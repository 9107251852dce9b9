"""Programs of this room as subprocesses: their answers, their errors, and that none outlives who asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.conftest import Eventually

from slipstream_server.errors import DeadlineExceeded, InternalError, InvalidField
from slipstream_server.models.tool_process import run_tool
from slipstream_server.models.with_parent import import_path

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def asked(**overrides: object) -> dict[str, object]:
    return {"config": LLAMA, "overrides": overrides, "is_whole": False, "auto_class": ""}


def tools(parent: int | None = None) -> Iterator[psutil.Process]:
    """The programs that a process has started and that still run."""
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE and "slipstream_server.models.examine" in child.cmdline():
                yield child


async def test_an_answer_and_an_error_come_back_as_they_were_meant() -> None:
    answer = await run_tool("examine", asked(num_hidden_layers=3), timeout_s=60)
    assert answer["config"]["num_hidden_layers"] == 3
    with pytest.raises(InvalidField) as error:
        await run_tool("examine", asked(num_hidden_layers=0), timeout_s=60)
    assert error.value.violations[0].field == "config_overrides.num_hidden_layers"
    assert not list(tools())


async def test_a_program_that_breaks_is_an_internal_error_without_its_words() -> None:
    with pytest.raises(InternalError) as error:
        await run_tool("no_such_program", {}, timeout_s=60)
    assert error.value.message == "the work failed; the log tells why"


async def test_a_program_that_takes_too_long_is_ended() -> None:
    with pytest.raises(DeadlineExceeded):
        await run_tool("examine", asked(), timeout_s=0.2)
    assert not list(tools())


async def test_a_cancelled_call_ends_its_program(assert_eventually: Eventually) -> None:
    call = asyncio.create_task(run_tool("examine", asked(), timeout_s=60))
    await assert_eventually(lambda: list(tools()))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not list(tools())


PARENT = """
import asyncio, sys

async def main():
    arguments = (sys.executable, sys.argv[1], "slipstream_server.models.examine")
    child = await asyncio.create_subprocess_exec(*arguments, stdin=asyncio.subprocess.PIPE, start_new_session=True)
    child.stdin.write(b"{}\\n")
    await child.wait()

asyncio.run(main())
"""
CHILD = """
import time
from slipstream_server.models.tool_side import answer, tell

def work(request):
    tell("working")
    time.sleep(99)
    return {}

answer(work)
"""


async def test_a_program_ends_with_the_process_that_started_it(tmp_path: Path, assert_eventually: Eventually) -> None:
    """Killed, the parent cannot end it: its standard input closes."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)
    scripts = (str(tmp_path / "parent.py"), str(tmp_path / "child.py"))
    parent = await asyncio.create_subprocess_exec(
        sys.executable, *scripts, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": import_path()}
    )
    assert parent.stdout is not None
    try:
        assert b"working" in await asyncio.wait_for(parent.stdout.readline(), 30)
        (child,) = tools(parent.pid)
        parent.kill()  # waiting for it would wait for the child too, which shares its output
        await assert_eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
