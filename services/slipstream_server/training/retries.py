"""Whether, and when, a failed attempt is followed by another one. Pure; any thread."""

from __future__ import annotations

from slipstream_server.errors import InternalError, StorageFull, WorkerDied
from slipstream_server.training.resources import Problem
from slipstream_server.training.specification import RetryPolicy

# Whatever else failed would fail again: a mistake of the specification or the rows, a model that does not load, memory
# that is too small.
_WORTH_ANOTHER = frozenset({WorkerDied.reason, StorageFull.reason, InternalError.reason})


def retry_after(policy: RetryPolicy, num_retries: int, problem: Problem) -> float | None:
    """Seconds to wait before the next attempt, after ``num_retries`` that there were; None: there is none."""
    if problem.reason not in _WORTH_ANOTHER or num_retries >= policy.max_retries:
        return None
    return policy.backoff_s(num_retries)
