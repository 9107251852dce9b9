"""What every test may use: waiting for something to become true instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

Eventually = Callable[..., Awaitable[None]]


async def _eventually(condition: Callable[[], object], *, timeout_s: float = 10.0) -> None:
    """Return once ``condition()`` is true; an AssertionError it raises counts as not yet, and is shown at the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        failure: AssertionError | None = None
        try:
            if condition():
                return
        except AssertionError as error:
            failure = error
        if time.monotonic() > deadline:
            raise failure or AssertionError(f"not true after {timeout_s} s")
        await asyncio.sleep(0.01)


@pytest.fixture
def assert_eventually() -> Eventually:
    """``await assert_eventually(lambda: ..., timeout_s=10)``."""
    return _eventually
