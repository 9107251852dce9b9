"""A core for each thread of a team that computes.

Threads of a team sleep and wake many times a step. Where another process keeps a core busy, the kernel likes to wake
one of them beside its partner: both then take turns on one core, at half the speed, and the other process has a core to
itself, however low its priority. A thread that is bound to a core takes its share of that core at once.

Only where the team has as many threads as there are cores; on Linux. Threads that a bound thread starts are bound with
it, so that those begin with ``go_anywhere``. Torch comes with a team only.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger(__name__)

# As it is before anybody is bound.
_ALL_CORES = os.sched_getaffinity(0) if sys.platform == "linux" else set()
# Enough for every thread to get a part of it.
_TEAMWORK_ITEMS = 1 << 20


def bind_team() -> None:
    """Bind the calling thread, which has not computed yet, and those that compute with it from now on."""
    import torch

    cores = sorted(_ALL_CORES)
    if len(cores) < 2 or torch.get_num_threads() != len(cores):
        return
    before = _threads()
    torch.ones(_TEAMWORK_ITEMS).add_(1)
    partners = sorted(_threads() - before)
    if len(partners) != len(cores) - 1:
        logger.info("threads go where they like: a team of %d was not found", len(cores))
        return
    # Workers begin at different cores: the first thread of each does more than its partners.
    first = os.getpid() % len(cores)
    for thread, core in zip([0, *partners], [*cores[first:], *cores[:first]], strict=True):
        os.sched_setaffinity(thread, {core})


def go_anywhere() -> None:
    """Let the calling thread run on every core, whatever started it."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, _ALL_CORES)


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
