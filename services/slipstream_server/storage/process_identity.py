"""Which process: its number and when it started, since numbers are given again.

The start is counted from the machine's boot and named with it, so that a clock that is set back or forth changes
nothing. Reads /proc on Linux, asks psutil elsewhere. Any thread; never waits.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process that runs or ran. ``start`` is opaque."""

    pid: int
    start: str

    @classmethod
    def current(cls) -> ProcessIdentity:
        found = cls.of(os.getpid())
        assert found is not None
        return found

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The living process ``pid``; None where there is none, or only one that waits to be reaped."""
        start = _start_of(pid)
        return None if start is None else cls(pid, start)

    def is_alive(self) -> bool:
        return _start_of(self.pid) == self.start


def _start_of(pid: int) -> str | None:
    if sys.platform != "linux":
        return _start_by_psutil(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name stands in brackets and may hold anything; state is the first field after it, start time the 20th.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else f"{_boot_id()}:{fields[19]}"


def _start_by_psutil(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
