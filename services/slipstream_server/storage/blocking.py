"""Threads for storage work that blocks, so that the event loop never waits for a disk or a bucket.

Started and awaited on the event loop; the work itself runs in a small pool of threads and knows no asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from slipstream_server.errors import DependencyUnavailable, SlipstreamError, StorageFull
from slipstream_server.storage.database_errors import OUT_OF_SPACE

P = ParamSpec("P")
R = TypeVar("R")

_RETRY_AFTER_S = 1.0


class BlockingThreads:
    """A bounded pool whose failures are named: StorageFull, or DependencyUnavailable otherwise."""

    def __init__(self, name: str, num_threads: int = 8) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``work(*args)`` in a thread. When cancelled, it first waits for the thread: nobody cleans up under it."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # seen
            raise
        except (SlipstreamError, FileNotFoundError):
            raise
        except OSError as failure:
            raise named(failure) from failure

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def named(failure: OSError) -> SlipstreamError:
    """The error that a failed read or write of the artifact store means."""
    if failure.errno in OUT_OF_SPACE:
        return StorageFull("the artifact store has no space left; nothing was stored", retry_after_s=_RETRY_AFTER_S)
    return DependencyUnavailable("the artifact store does not answer", retry_after_s=_RETRY_AFTER_S)
