"""An event loop on a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

from slipstream_client.errors import SlipstreamClientError

Result = TypeVar("Result")
Item_co = TypeVar("Item_co", covariant=True)


class Items(Protocol[Item_co]):
    """An asynchronous iterator that can be closed."""

    def __anext__(self) -> Awaitable[Item_co]: ...

    def aclose(self) -> Coroutine[Any, Any, None]: ...


class LoopThread:
    """An event loop on a daemon thread, which runs coroutines for other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="slipstream-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` on the loop and wait for it. Interrupting the wait (Ctrl-C) cancels the work."""
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            work.close()
            raise SlipstreamClientError(
                "the client is closed" if not self._thread.is_alive() else "called on its own loop"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Stop the loop and its thread; further calls of ``stop`` change nothing."""
        if self._thread.is_alive():
            self.run(self._loop.shutdown_asyncgens())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def iterate(self, items: Items[Result]) -> Iterator[Result]:
        """The items for a plain ``for``; leaving the loop early closes them, on the server too."""
        try:
            while True:
                try:
                    item = self.run(_next(items))
                except _Ended:
                    return
                yield item
        finally:
            self.run(items.aclose())


class _Ended(Exception):
    """There is no further item. (StopAsyncIteration cannot leave a coroutine.)"""


async def _next(items: Items[Result]) -> Result:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        raise _Ended from None
