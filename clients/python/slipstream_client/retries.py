"""When a failed call is tried again, and how long to wait before it.

Plain arithmetic: no clock, no channel, no sleeping.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from slipstream_client.errors import (
    InvalidRequestError,
    ResourceExhaustedError,
    SlipstreamClientError,
    UnavailableError,
)

# Waiting does not mend these, unless the server itself says when to come back. A request on board when a worker died
# twice may be what kills it.
NOT_MENDED_BY_WAITING = frozenset(
    {"MESSAGE_TOO_LARGE", "OUT_OF_MEMORY", "QUOTA_EXCEEDED", "SLOW_READER", "STORAGE_FULL", "WORKER_DIED"}
)
# Clients told to come back at the same moment spread over this much of the wait.
SPREAD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter. ``max_attempts`` counts the first one: 1 switches retries off."""

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidRequestError.of("max_attempts", f"{self.max_attempts} is not 1 or more")
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s or self.multiplier < 1:
            raise InvalidRequestError.of(
                "initial_backoff_s",
                f"needs 0 <= initial_backoff_s ({self.initial_backoff_s}) <= max_backoff_s ({self.max_backoff_s}) "
                f"and multiplier ({self.multiplier}) >= 1",
            )

    def delay_s(self, failed_attempts: int, error: SlipstreamClientError, remaining_s: float) -> float | None:
        """Seconds to wait before the next attempt; None where there is none.

        ``failed_attempts`` counts from 1; ``remaining_s`` is what the deadline leaves. Where the wait does not fit
        into it, the failure at hand tells more than a deadline would, so there is no further attempt.
        """
        if failed_attempts >= self.max_attempts or not may_pass(error):
            return None
        delay = self._asked_for(error) if error.retry_after_s is not None else self._backoff(failed_attempts)
        return delay if delay < remaining_s else None

    def _asked_for(self, error: SlipstreamClientError) -> float:
        assert error.retry_after_s is not None
        return error.retry_after_s * (1 + SPREAD * random.random())  # noqa: S311 - jitter, not a secret

    def _backoff(self, failed_attempts: int) -> float:
        ceiling = min(self.max_backoff_s, self.initial_backoff_s * self.multiplier ** (failed_attempts - 1))
        return ceiling * (0.5 + 0.5 * random.random())  # noqa: S311 - jitter, not a secret


def may_pass(error: SlipstreamClientError) -> bool:
    """Whether the same request may succeed later."""
    if not isinstance(error, UnavailableError | ResourceExhaustedError):
        return False
    return error.retry_after_s is not None or error.reason not in NOT_MENDED_BY_WAITING
