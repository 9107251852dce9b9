"""What surrounds the forward passes of tasks, done off the engine's thread: inputs are prepared and results finished
here, a handful at a time, first come first served.

A job is a plain function of its arguments; what it returns is taken by the engine on its own thread. A request with
many inputs comes back to the end of the line after each handful, so that others get their turn. Torch-free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Outcome = TypeVar("Outcome")


class SideThreads(Generic[Outcome]):
    """Threads that do jobs; ``wake`` is called from them whenever an outcome lies ready."""

    def __init__(self, num_threads: int, wake: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tasks")
        self._wake = wake
        self._ready: deque[Outcome] = deque()

    @property
    def has_outcomes(self) -> bool:
        return bool(self._ready)

    def do(self, job: Callable[[], Outcome]) -> None:
        """Have ``job`` done; it must not raise."""
        self._pool.submit(self._work, job)

    def take(self) -> list[Outcome]:
        """The outcomes that lie ready."""
        taken: list[Outcome] = []
        while self._ready:
            taken.append(self._ready.popleft())
        return taken

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, job: Callable[[], Outcome]) -> None:
        try:
            self._ready.append(job())
        finally:
            self._wake()
