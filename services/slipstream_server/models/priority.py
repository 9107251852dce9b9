"""Low priority for work that nobody waits for at this very moment: fetching, preparing, reading weights.

Linux counts niceness by thread, and where sessions are scheduled as groups ("autogroup"), by group: a process in a
session of its own has to be lowered as both, or its niceness means nothing to the others. Elsewhere nothing happens.
Any thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# A third of the processor beside a thread of ordinary priority that wants all of it: enough to get done.
NICENESS = 5


def lower_thread() -> None:
    """Let this thread, and the threads and processes that it starts, wait for others."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def lower_process(pid: int) -> None:
    """Let a process that has just been started in a session of its own wait for others."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
        _set_group(pid, NICENESS)


def is_lowered() -> bool:
    """Whether this thread waits for others: ``lower_thread`` was called for it, or the whole process runs that way."""
    return sys.platform == "linux" and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) >= NICENESS


@contextlib.contextmanager
def lowered_group() -> Iterator[None]:
    """Within it, this process's session waits for others; unlike a thread's niceness, this can be taken back."""
    _set_group(os.getpid(), NICENESS)
    try:
        yield
    finally:
        _set_group(os.getpid(), 0)


def _set_group(pid: int, niceness: int) -> None:
    group = Path(f"/proc/{pid}/autogroup")
    # The kernel takes one such change every 100 ms from all of the machine's users together.
    for _ in range(10):
        try:
            group.write_text(str(niceness))
        except BlockingIOError:
            threading.Event().wait(0.05)
        except OSError:  # no such groups here
            return
        else:
            return
