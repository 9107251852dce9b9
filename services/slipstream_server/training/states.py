"""The states of datasets and jobs, and which may follow which. Pure data; any thread.

    VALIDATING -> QUEUED -> STARTING -> RUNNING -> EVALUATING -> PUBLISHING -> SUCCEEDED
                  ^  ^         |           |            |             |
                  |  +---------+-----------+------------+  (a retry)  +-> FAILED
                  +- PAUSED <--+-----------+------------+

A job ends CANCELLED or FAILED from any state before its end, and may go from there to QUEUED again where it has
something to go on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from slipstream_server.errors import WrongState


class DatasetState(StrEnum):
    VALIDATING = "validating"
    READY = "ready"
    INVALID = "invalid"
    FAILED = "failed"


class JobState(StrEnum):
    VALIDATING = "validating"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Order(StrEnum):
    """What somebody wants of a job that has processes."""

    NONE = ""
    PAUSE = "pause"
    CANCEL = "cancel"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
WITH_PROCESSES = frozenset({JobState.STARTING, JobState.RUNNING, JobState.EVALUATING})
PAUSABLE = frozenset({JobState.QUEUED, JobState.STARTING, JobState.RUNNING})
RESUMABLE = frozenset({JobState.PAUSED, JobState.FAILED, JobState.CANCELLED})

_S = JobState
_LEAVING_PROCESSES = frozenset({_S.QUEUED, _S.PAUSED, _S.PUBLISHING, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED})

NEXT: Mapping[JobState, frozenset[JobState]] = {
    _S.VALIDATING: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.STARTING, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    _S.STARTING: _LEAVING_PROCESSES | {_S.RUNNING},
    _S.RUNNING: _LEAVING_PROCESSES | {_S.EVALUATING},
    _S.EVALUATING: _LEAVING_PROCESSES,
    _S.PAUSED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.PUBLISHING: frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset({_S.QUEUED}),
    _S.CANCELLED: frozenset({_S.QUEUED}),
}


def check_next(state: JobState, following: JobState) -> None:
    """Raises WrongState where ``following`` may not come after ``state``."""
    if following not in NEXT[state]:
        raise wrong_state(state, f"it cannot become {following}")


def wrong_state(state: JobState, why: str) -> WrongState:
    return WrongState(f"the job is {state}: {why}", metadata={"state": state.upper()})
