"""Who follows the registry on behalf of requests, and which events each has put into force.

A resolver lives as long as its watch does. A change is confirmed when every resolver that lives has acknowledged it.
One that leaves meanwhile is not waited for, but named among the unconfirmed unless it comes back in time and
acknowledges: what it serves is not known. Kept in memory: after a restart of this service the resolvers open their
watches anew. Event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from slipstream_server.errors import InvalidField, WrongState


@dataclass(slots=True, eq=False)
class ResolverWatch:
    """One resolver's open stream: the last event it was sent and the last one it has put into force.

    ``replaced`` is set when a newer stream of the same resolver takes over.
    """

    resolver_id: str
    watch_id: str = field(default_factory=lambda: secrets.token_hex(16))
    sent: int = 0
    acknowledged: int = 0
    replaced: asyncio.Event = field(default_factory=asyncio.Event)


class Resolvers:
    """The resolvers that live now, by their ids."""

    def __init__(self) -> None:
        self._watches: dict[str, ResolverWatch] = {}
        self._changed = asyncio.Event()

    @contextmanager
    def watching(self, resolver_id: str) -> Iterator[ResolverWatch]:
        """A new watch of the resolver, which takes over from an older one; alive inside the block."""
        watch = ResolverWatch(resolver_id)
        older = self._watches.get(resolver_id)
        if older is not None:
            older.replaced.set()
        self._watches[resolver_id] = watch
        try:
            yield watch
        finally:
            if self._watches.get(resolver_id) is watch:
                del self._watches[resolver_id]
            self._ring()

    def acknowledge(self, resolver_id: str, watch_id: str, sequence: int) -> int:
        """The highest number acknowledged so far. Raises WrongState for a watch that is gone, InvalidField."""
        watch = self._watches.get(resolver_id)
        if watch is None or watch.watch_id != watch_id:
            raise WrongState("watch_id: the resolver's stream is gone; open a new one")
        if not 0 <= sequence <= watch.sent:
            raise InvalidField.of("sequence", f"{sequence} was never sent on this stream, the last was {watch.sent}")
        watch.acknowledged = max(watch.acknowledged, sequence)
        self._ring()
        return watch.acknowledged

    async def confirmed(self, sequence: int, timeout_s: float) -> tuple[str, ...]:
        """Wait until every live resolver has acknowledged ``sequence``; the ids of those that did not."""
        deadline = time.monotonic() + timeout_s
        waited_for: set[str] = set()
        while behind := self._behind(sequence):
            waited_for |= behind
            if not await self._rings_before(deadline):
                break
        confirmed = {watch.resolver_id for watch in self._watches.values() if watch.acknowledged >= sequence}
        return tuple(sorted((waited_for | self._behind(sequence)) - confirmed))

    def _behind(self, sequence: int) -> set[str]:
        return {watch.resolver_id for watch in self._watches.values() if watch.acknowledged < sequence}

    async def _rings_before(self, deadline: float) -> bool:
        changed = self._changed
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await changed.wait()
        except TimeoutError:
            return False
        return True

    def _ring(self) -> None:
        """Wake everybody who waits now; who waits later waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
