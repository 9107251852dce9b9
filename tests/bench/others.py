"""How much of the cores goes to others than the bench: figures of turns in which it was much mean little."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.05
_POLL_S = 0.5
_IDLE_FIELDS = (3, 4)  # idle, iowait: see proc(5), /proc/stat
_GUEST_FIELD = 8


@dataclass(frozen=True, slots=True)
class Moment:
    """What had been used until then: seconds of cores, by everybody and by this process; and the time."""

    everybody_s: float
    own_s: float
    at_s: float

    @classmethod
    def now(cls) -> Moment:
        fields = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        used = sum(ticks for place, ticks in enumerate(fields[:_GUEST_FIELD]) if place not in _IDLE_FIELDS)
        times = os.times()
        return cls(used / os.sysconf("SC_CLK_TCK"), times.user + times.system, time.monotonic())

    def share_of_others(self) -> float:
        """What part of all cores others have had since; to some hundredths within a second."""
        now = Moment.now()
        others_s = (now.everybody_s - self.everybody_s) - (now.own_s - self.own_s)
        return max(0.0, others_s / max(now.at_s - self.at_s, 1e-9) / (os.cpu_count() or 1))


def wait_for_quiet(most_s: float) -> None:
    """Sleep until others leave the cores alone, but not for longer than ``most_s``."""
    end_s = time.monotonic() + most_s
    while time.monotonic() < end_s:
        before = Moment.now()
        time.sleep(_POLL_S)
        if before.share_of_others() < QUIET:
            return
