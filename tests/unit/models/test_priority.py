"""Work that nobody waits for is niced, and those that come after it in the same process are not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipstream_server.models.priority import NICENESS, is_lowered, lower_process, lower_thread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="niceness of threads is Linux's")
GROUP = Path("/proc/self/autogroup")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_lowered_thread_leaves_the_others_alone() -> None:
    before = niceness()
    with ThreadPoolExecutor(1, initializer=lower_thread) as background:
        assert background.submit(niceness).result() == NICENESS
        assert background.submit(is_lowered).result()
    assert niceness() == before


def test_a_process_is_lowered_from_outside() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            lower_process(process.pid)
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == NICENESS
        finally:
            process.kill()
    lower_process(process.pid)  # gone: nothing happens


@pytest.mark.skipif(not GROUP.exists(), reason="this kernel schedules no sessions as groups")
def test_a_session_is_lowered_and_comes_back() -> None:
    program = (
        "from pathlib import Path\n"
        "from slipstream_server.models.priority import lowered_group\n"
        "show = lambda: print(Path('/proc/self/autogroup').read_text().split()[-1])\n"
        "with lowered_group(): show()\n"
        "show()"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True)
    assert told.stdout.split() == [str(NICENESS), "0"], told.stderr
