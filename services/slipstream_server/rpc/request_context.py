"""What is known about the call that is being answered: its caller and its deadline.

Context variables, set once per call by ``rpc/calls.py`` and read by servicers and outgoing channels; every task that a
handler starts inherits them. The request id, which the inner rooms log as well, lives in ``slipstream_server.logs``.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

import grpc

ANONYMOUS = "anonymous"

_caller: ContextVar[str] = ContextVar("caller", default=ANONYMOUS)
_deadline_monotonic_s: ContextVar[float | None] = ContextVar("deadline_monotonic_s", default=None)


def caller() -> str:
    """The name the token file gives to this call's token; "anonymous" where the server asks for no token."""
    return _caller.get()


def deadline_monotonic_s(context: grpc.aio.ServicerContext[Any, Any] | None = None) -> float | None:
    """When the call must be over, on ``time.monotonic``'s clock; None where the client set no deadline.

    Without ``context``: that of the call this task belongs to.
    """
    if context is None:
        return _deadline_monotonic_s.get()
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


def remaining_s() -> float | None:
    """Seconds left of this task's call, 0 when it is over; None without a deadline."""
    deadline = _deadline_monotonic_s.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def set_caller(name: str) -> None:
    """For the router: who makes this call."""
    _caller.set(name)


def set_deadline(deadline: float | None) -> None:
    """For the call guard: when this call must be over."""
    _deadline_monotonic_s.set(deadline)
