"""Threads on cores of their own, tried in a process that may be bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import json, os, threading
from concurrent.futures import ThreadPoolExecutor
import torch
torch.set_num_threads(int({threads}))
from slipstream_server.inference.engine.cores import bind_team, go_anywhere
bind_team()
torch.ones(1 << 20).add_(1)
cores = [sorted(os.sched_getaffinity(int(name))) for name in os.listdir("/proc/self/task")]
with ThreadPoolExecutor(1, initializer=go_anywhere) as pool:
    later = sorted(pool.submit(os.sched_getaffinity, 0).result())
print(json.dumps([[each for each in cores if len(each) == 1], later]))
"""

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


def bound(threads: int) -> tuple[list[list[int]], list[int]]:
    """The cores of threads that have one to themselves, and those of a thread that came later."""
    program = _PROGRAM.replace("{threads}", str(threads))
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    cores, later = json.loads(output)
    return cores, later


def test_a_team_has_a_core_for_each_thread_and_later_threads_have_all() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cores, later = bound(len(allowed))
    assert sorted(cores) == [[core] for core in allowed]
    assert later == allowed


def test_a_team_that_leaves_cores_to_others_goes_anywhere() -> None:
    cores, later = bound(1)
    assert cores == []
    assert later == sorted(os.sched_getaffinity(0))
