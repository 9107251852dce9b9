"""When a call is tried again."""

import pytest

from slipstream_client.errors import (
    AbortedError,
    InvalidRequestError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from slipstream_client.retries import RetryPolicy

POLICY = RetryPolicy(max_attempts=4, initial_backoff_s=0.2, max_backoff_s=0.5, multiplier=2)


@pytest.mark.parametrize("kind", [AbortedError, NotFoundError, ServerError, InvalidRequestError])
def test_other_failures_are_final(kind):
    assert POLICY.delay_s(1, kind("no", retry_after_s=0.1), 60) is None


@pytest.mark.parametrize(("failed", "lowest", "highest"), [(1, 0.1, 0.2), (2, 0.2, 0.4), (3, 0.25, 0.5)])
def test_backoff_doubles_up_to_its_limit_with_jitter(failed, lowest, highest):
    delays = {POLICY.delay_s(failed, UnavailableError("down"), 60) for _ in range(200)}
    assert lowest <= min(delays) <= max(delays) <= highest
    assert len(delays) > 100


def test_the_servers_word_beats_the_backoff():
    delays = [POLICY.delay_s(1, ResourceExhaustedError("full", retry_after_s=3), 60) for _ in range(50)]
    assert all(3 <= delay <= 3.3 for delay in delays)


def test_attempts_are_bounded():
    assert POLICY.delay_s(4, UnavailableError("down"), 60) is None


def test_a_wait_beyond_the_deadline_is_not_begun():
    assert POLICY.delay_s(1, UnavailableError("down", retry_after_s=5), 4.9) is None


@pytest.mark.parametrize("reason", ["MESSAGE_TOO_LARGE", "QUOTA_EXCEEDED", "SLOW_READER"])
def test_what_waiting_does_not_mend_is_final_unless_the_server_says_when(reason):
    assert POLICY.delay_s(1, ResourceExhaustedError("no", reason=reason), 60) is None
    assert POLICY.delay_s(1, ResourceExhaustedError("no", reason=reason, retry_after_s=1), 60) is not None


def test_a_request_that_saw_two_workers_die_is_not_sent_again():
    assert POLICY.delay_s(1, UnavailableError("died", reason="WORKER_DIED"), 60) is None


@pytest.mark.parametrize("values", [{"max_attempts": 0}, {"initial_backoff_s": -1}, {"multiplier": 0.5}])
def test_bad_policies_are_refused(values):
    with pytest.raises(InvalidRequestError):
        RetryPolicy(**values)
