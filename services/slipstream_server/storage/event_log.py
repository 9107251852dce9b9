"""An append-only log of events in numbered streams, and watchers that wake when one grows.

A stream's sequence numbers are 1, 2, 3, ... without a gap, in the order of commit, and never given twice, not even
after old events were trimmed. Payloads are bytes; the log does not look inside.

Lives on the service's event loop. Watchers are woken by commits of this process at once, and see those of other
processes within ``poll_interval_s``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, String, Table, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.storage.columns import UtcTime, utc_now
from slipstream_server.storage.database import Database, after_commit


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event. ``time`` is when it was appended, or what the writer said; order is by ``sequence`` alone."""

    sequence: int
    time: datetime
    payload: bytes


@dataclass(frozen=True, slots=True)
class Bounds:
    """The sequence numbers a stream still holds: ``first`` to ``last``; empty when ``first`` is ``last + 1``."""

    first: int
    last: int


class EventLog:
    """The tables ``<name>`` and ``<name>_heads`` of one service."""

    def __init__(self, metadata: MetaData, name: str, *, poll_interval_s: float = 1.0) -> None:
        self.events = Table(name, metadata, *event_columns())
        self.heads = Table(f"{name}_heads", metadata, *head_columns())
        self._poll_interval_s = poll_interval_s
        self._bells: dict[str, set[asyncio.Event]] = {}

    async def append(
        self, session: AsyncSession, stream: str, payloads: Sequence[bytes], time: datetime | None = None
    ) -> range:
        """Append ``payloads`` in a write transaction; returns their sequence numbers. Its commit wakes the watchers."""
        last = await self._last(session, stream)
        numbers = range((last or 0) + 1, (last or 0) + 1 + len(payloads))
        if not payloads:
            return numbers
        head = {"stream": stream, "last_sequence": numbers[-1]}
        if last is None:
            await session.execute(insert(self.heads).values(head))
        else:
            await session.execute(update(self.heads).where(self.heads.c.stream == stream).values(head))
        when = time or utc_now()
        rows = [
            {"stream": stream, "sequence": sequence, "time": when, "payload": payload}
            for sequence, payload in zip(numbers, payloads, strict=True)
        ]
        await session.execute(insert(self.events), rows)
        after_commit(session, lambda: self._ring(stream))
        return numbers

    async def read(
        self, session: AsyncSession, stream: str, after_sequence: int, limit: int = 256
    ) -> tuple[StoredEvent, ...]:
        """The next events after ``after_sequence`` (0: from the first kept one), at most ``limit``."""
        c = self.events.c
        found = select(c.sequence, c.time, c.payload).where(c.stream == stream, c.sequence > after_sequence)
        rows = await session.execute(found.order_by(c.sequence).limit(limit))
        return tuple(StoredEvent(row.sequence, row.time, row.payload) for row in rows)

    async def bounds(self, session: AsyncSession, stream: str) -> Bounds:
        """Which sequence numbers ``stream`` holds; (1, 0) for a stream that never had any."""
        last = await self._last(session, stream) or 0
        oldest = select(func.min(self.events.c.sequence)).where(self.events.c.stream == stream)
        first = (await session.execute(oldest)).scalar_one()
        return Bounds(last + 1 if first is None else first, last)

    async def trim(self, session: AsyncSession, stream: str, through_sequence: int) -> None:
        """Drop the events up to ``through_sequence``; their numbers are not given again."""
        c = self.events.c
        await session.execute(delete(self.events).where(c.stream == stream, c.sequence <= through_sequence))

    async def forget(self, session: AsyncSession, stream: str) -> None:
        """Drop ``stream`` whole, because what it tells of is deleted."""
        await session.execute(delete(self.events).where(self.events.c.stream == stream))
        await session.execute(delete(self.heads).where(self.heads.c.stream == stream))

    async def follow(
        self, database: Database, stream: str, after_sequence: int, limit: int = 256
    ) -> AsyncGenerator[tuple[StoredEvent, ...], None]:
        """Batches of events after ``after_sequence``, for ever: waits where there are none. Close it to stop.

        Raises DependencyUnavailable when the database goes away; follow again from the last sequence seen.
        """
        bell = asyncio.Event()
        self._bells.setdefault(stream, set()).add(bell)
        try:
            while True:
                # Cleared before reading: what commits during the read rings again.
                bell.clear()
                async with database.read() as session:
                    batch = await self.read(session, stream, after_sequence, limit)
                if batch:
                    after_sequence = batch[-1].sequence
                    yield batch
                else:
                    await self._rung(bell)
        finally:
            self._unhang(stream, bell)

    async def _last(self, session: AsyncSession, stream: str) -> int | None:
        found = select(self.heads.c.last_sequence).where(self.heads.c.stream == stream)
        last: int | None = (await session.execute(found)).scalar_one_or_none()
        return last

    def _ring(self, stream: str) -> None:
        for bell in self._bells.get(stream, ()):
            bell.set()

    async def _rung(self, bell: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._poll_interval_s):
                await bell.wait()
        except TimeoutError:
            pass

    def _unhang(self, stream: str, bell: asyncio.Event) -> None:
        bells = self._bells[stream]
        bells.discard(bell)
        if not bells:
            del self._bells[stream]


def event_columns() -> list[Column[object]]:
    return [
        Column("stream", String(255), primary_key=True),
        Column("sequence", BigInteger, primary_key=True, autoincrement=False),
        Column("time", UtcTime, nullable=False),
        Column("payload", LargeBinary, nullable=False),
    ]


def head_columns() -> list[Column[object]]:
    return [
        Column("stream", String(255), primary_key=True),
        Column("last_sequence", BigInteger, nullable=False),
    ]
