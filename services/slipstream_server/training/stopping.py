"""SIGTERM and SIGINT, told to the code that can act on them.

While weights are being trained a signal only sets a flag, which the loop looks at after every step, so that a
checkpoint can be written; at any other time it ends the run at once by raising StopRequested in the main thread. The
first signal counts, the others are ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """The process was asked to end. No Exception, so that no library's handler takes it for a failure of its own."""


class StopSignal:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.is_requested = False
        self._is_deferred = False

    def install(self) -> None:
        """Take over the signals; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal only sets ``is_requested``."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            return
        self.is_requested = True
        if not self._is_deferred:
            raise StopRequested
