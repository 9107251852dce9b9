"""The runner's side of the spool: one process of a job speaks, and each may report its own failure.

The first process to fail is often not the first one of the job, and the others end by a signal. For the main thread of
the runner.
"""

from __future__ import annotations

import logging
import math

from slipstream_server.training.events import MAX_MESSAGE_CHARACTERS, AnyEvent, Failed, Log
from slipstream_server.training.failures import Failure
from slipstream_server.training.spool import SpoolWriter

logger = logging.getLogger(__name__)


class Reporter:
    """Writes the events of one attempt."""

    def __init__(self, spool: SpoolWriter, *, is_main_process: bool) -> None:
        self._spool = spool
        self._is_main_process = is_main_process

    def tell(self, event: AnyEvent) -> None:
        """Append ``event``, if this is the process that speaks; raises OSError where the disk is full."""
        if self._is_main_process:
            self._spool.write(event)

    def warn(self, message: str) -> None:
        logger.warning("%s", message)
        self.tell(Log(level="WARNING", message=message[:MAX_MESSAGE_CHARACTERS]))

    def fail(self, failure: Failure) -> None:
        """Where not even this line has room, only the exit status tells."""
        logger.error("training failed: %s: %s", failure.reason, failure.message)
        try:
            self._spool.write(Failed(reason=failure.reason, message=failure.message[:MAX_MESSAGE_CHARACTERS]))
        except OSError as error:
            logger.error("the failure could not be written to the spool: %s", error.strerror)


def finite(value: float | None) -> float | None:
    """``value``, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None
