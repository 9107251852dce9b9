"""Notices when the event loop stands still, and says where.

The loop beats every 50 ms; a thread of its own looks at the beat and, once it is 200 ms late, notes the stack the loop
is stuck in. When the loop moves again the stall is counted and logged with that stack. The thread never touches the
loop.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable

logger = logging.getLogger(__name__)

_BEAT_S = 0.05
STALL_S = 0.2


class StallWatch:
    """Watches the running loop from ``start`` to ``stop``; ``on_stall`` is called from the watching thread."""

    def __init__(self, on_stall: Callable[[], None]) -> None:
        self._on_stall = on_stall
        self._stop = threading.Event()
        self._last_beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        self._handle: asyncio.TimerHandle | None = None
        self._loop_thread_id = 0

    def start(self) -> None:
        """Call on the loop to be watched."""
        self._loop_thread_id = threading.get_ident()
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Call on the loop; returns when the watching thread has ended."""
        self._stop.set()
        if self._handle is not None:
            self._handle.cancel()
        self._thread.join()

    def _beat(self) -> None:
        self._last_beat_s = time.monotonic()
        self._handle = asyncio.get_running_loop().call_later(_BEAT_S, self._beat)

    def _watch(self) -> None:
        stalled_at_s = 0.0
        stack = ""
        while not self._stop.wait(_BEAT_S):
            beat_s = self._last_beat_s
            if stack and beat_s > stalled_at_s:
                logger.warning("the event loop stood still for %.2f s, at\n%s", beat_s - stalled_at_s, stack)
                self._on_stall()
                stack = ""
            elif not stack and time.monotonic() - beat_s > STALL_S:
                stalled_at_s, stack = beat_s, self._stack_of_loop()

    def _stack_of_loop(self) -> str:
        frame = sys._current_frames().get(self._loop_thread_id)
        return "".join(traceback.format_stack(frame, limit=12)) if frame else "(no stack)"
