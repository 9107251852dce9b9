"""The registry as a stream: a snapshot where one is needed, every event in order, and signs of life. Event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from slipstream_server.adapters.journal import STREAM
from slipstream_server.adapters.resources import (
    ActiveAdapter,
    Alias,
    Version,
    active_of,
    aliases_of,
    versions_of,
)
from slipstream_server.adapters.tables import EVENTS, SERVABLE, ActiveRow, AliasRow, VersionRow
from slipstream_server.errors import InvalidField, SlowReader
from slipstream_server.storage.database import Database
from slipstream_server.storage.event_log import StoredEvent

HEARTBEAT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The registry at one moment: what can be served, every alias and every active adapter."""

    sequence: int
    versions: tuple[Version, ...]
    aliases: tuple[Alias, ...]
    active: tuple[ActiveAdapter, ...]


@dataclass(frozen=True, slots=True)
class Events:
    """1 or more events without gaps."""

    events: tuple[StoredEvent, ...]

    @property
    def sequence(self) -> int:
        return self.events[-1].sequence


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing has changed after ``sequence``."""

    sequence: int


News = Snapshot | Events | Heartbeat


class Watching:
    """Streams of one database's registry."""

    def __init__(self, database: Database, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._database = database
        self._heartbeat_s = heartbeat_s

    async def follow(self, after_sequence: int, until: asyncio.Event) -> AsyncGenerator[News, None]:
        """What happened after ``after_sequence``, until the event is set. 0, or a number too old: a snapshot first.

        Begins at once, with a heartbeat where there is nothing to tell. Raises InvalidField for a number of the future,
        SlowReader where events were dropped before the caller came to them.
        """
        news = await self._first(after_sequence)
        yield news
        batches = EVENTS.follow(self._database, STREAM, news.sequence)
        ended: asyncio.Future[Any] = asyncio.ensure_future(until.wait())
        coming: asyncio.Future[Any] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(batches))
                await asyncio.wait({coming, ended}, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    return
                if coming.done():
                    news, coming = _without_gap(news.sequence, coming.result()), None
                else:
                    news = Heartbeat(news.sequence)
                yield news
        finally:
            await _cancel(ended, coming)
            await batches.aclose()

    async def _first(self, after_sequence: int) -> News:
        async with self._database.read() as session:
            kept = await EVENTS.bounds(session, STREAM)
        if not 0 <= after_sequence <= kept.last:
            raise InvalidField.of("after_sequence", f"{after_sequence} is not from 0 to {kept.last}, the last event")
        if after_sequence == 0 or after_sequence < kept.first - 1:
            return await self.snapshot()
        return Heartbeat(after_sequence)

    async def snapshot(self) -> Snapshot:
        """The registry now."""
        async with self._database.read() as session:
            versions = select(VersionRow).where(VersionRow.state.in_(SERVABLE))
            aliases = select(AliasRow).where(AliasRow.number.is_not(None))
            active = select(ActiveRow).order_by(ActiveRow.model)
            return Snapshot(
                sequence=(await EVENTS.bounds(session, STREAM)).last,
                versions=await versions_of(
                    session, (await session.scalars(versions.order_by(VersionRow.adapter, VersionRow.number))).all()
                ),
                aliases=await aliases_of(
                    session, (await session.scalars(aliases.order_by(AliasRow.adapter, AliasRow.alias))).all()
                ),
                active=tuple(active_of(row) for row in await session.scalars(active)),
            )


def _without_gap(sequence: int, events: tuple[StoredEvent, ...]) -> Events:
    if events[0].sequence != sequence + 1:
        raise SlowReader("the stream fell behind the events that are kept; watch again")
    return Events(events)


async def _cancel(*futures: asyncio.Future[Any] | None) -> None:
    running = {future for future in futures if future is not None}
    for future in running:
        future.cancel()
    await asyncio.wait(running)
