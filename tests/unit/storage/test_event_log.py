"""Event logs: gapless numbers, reading from anywhere, watchers that wake."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.event_log import Bounds, EventLog, StoredEvent
from slipstream_server.storage.migrations import migrate
from unit.storage.shelf import SCHEMA, Rows, events


@pytest.fixture
async def db(database: Database) -> Database:
    await migrate(database, SCHEMA)
    return database


async def append(db: Database, *payloads: bytes, stream: str = "job-1") -> range:
    async with db.write() as session:
        return await events.append(session, stream, payloads)


async def all_of(db: Database, after_sequence: int = 0, stream: str = "job-1") -> list[tuple[int, bytes]]:
    async with db.read() as session:
        found = await events.read(session, stream, after_sequence)
    return [(event.sequence, event.payload) for event in found]


async def test_numbers_begin_at_one_in_each_stream(db: Database) -> None:
    assert await append(db, b"a", b"b") == range(1, 3)
    assert await append(db, b"c") == range(3, 4)
    assert await append(db, b"x", stream="job-2") == range(1, 2)
    assert await append(db) == range(4, 4)
    assert await all_of(db) == [(1, b"a"), (2, b"b"), (3, b"c")]
    assert await all_of(db, after_sequence=2) == [(3, b"c")]


async def test_a_rolled_back_append_leaves_no_gap(db: Database) -> None:
    await append(db, b"a")
    with pytest.raises(RuntimeError):
        async with db.write() as session:
            await events.append(session, "job-1", [b"lost"])
            raise RuntimeError
    await append(db, b"b")
    assert await all_of(db) == [(1, b"a"), (2, b"b")]


async def test_many_writers_leave_no_gap_and_no_duplicate(db: Database) -> None:
    await asyncio.gather(*(append(db, f"{n}a".encode(), f"{n}b".encode()) for n in range(25)))
    found = await all_of(db)
    assert [sequence for sequence, _ in found] == list(range(1, 51))
    assert {payload for _, payload in found} == {f"{n}{x}".encode() for n in range(25) for x in "ab"}


async def test_an_event_keeps_its_time_to_the_microsecond(db: Database) -> None:
    when = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
    async with db.write() as session:
        await events.append(session, "job-1", [b"a"], time=when)
    async with db.read() as session:
        assert await events.read(session, "job-1", 0) == (StoredEvent(1, when, b"a"),)


async def test_trimmed_numbers_are_never_given_again(db: Database) -> None:
    await append(db, b"a", b"b", b"c")
    async with db.write() as session:
        await events.trim(session, "job-1", 2)
        assert await events.bounds(session, "job-1") == Bounds(3, 3)
        await events.trim(session, "job-1", 3)
        assert await events.bounds(session, "job-1") == Bounds(4, 3)
    assert await append(db, b"d") == range(4, 5)
    assert await all_of(db) == [(4, b"d")]


async def test_a_forgotten_stream_begins_anew(db: Database) -> None:
    await append(db, b"a")
    async with db.write() as session:
        await events.forget(session, "job-1")
        assert await events.bounds(session, "job-1") == Bounds(1, 0)
    assert await append(db, b"b") == range(1, 2)


async def test_twenty_watchers_that_reconnect_at_random_see_every_event_once(db: Database) -> None:
    total = 60
    await append(db, b"1")

    async def watch(seed: int) -> list[int]:
        dice, seen = random.Random(seed), []
        while len(seen) < total:
            patience = dice.randint(1, 12)
            async with aclosing(events.follow(db, "job-1", seen[-1] if seen else 0, limit=5)) as batches:
                async for batch in batches:
                    seen += [event.sequence for event in batch]
                    patience -= 1
                    if patience == 0 or len(seen) >= total:
                        break
        return seen

    async def write() -> None:
        for n in range(1, total):
            await append(db, f"{n}".encode())

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        watchers = [group.create_task(watch(seed)) for seed in range(20)]
        group.create_task(write())
    assert [watcher.result() for watcher in watchers] == [list(range(1, total + 1))] * 20


async def test_a_watcher_wakes_at_once_and_leaves_nothing_behind(db: Database) -> None:
    log = EventLog(Rows.metadata.__class__(), "shelf_events", poll_interval_s=3600)
    stream = log.follow(db, "job-1", 0)
    waiting = asyncio.ensure_future(anext(stream))
    for _ in range(3):  # with an hour between polls, only the bell can bring the event in time
        await asyncio.wait({waiting}, timeout=0.05)
        assert not waiting.done()
    async with db.write() as session:
        await log.append(session, "job-1", [b"a"])
    assert [event.payload for event in await asyncio.wait_for(waiting, timeout=5)] == [b"a"]
    await stream.aclose()
    assert log._bells == {}


async def test_a_watcher_sees_what_another_process_wrote(dsn: str) -> None:
    here, there = Database(DatabaseConfig(dsn=dsn)), Database(DatabaseConfig(dsn=dsn))
    await migrate(here, SCHEMA)
    reader, writer = (EventLog(Rows.metadata.__class__(), "shelf_events", poll_interval_s=0.05) for _ in range(2))
    async with aclosing(reader.follow(here, "job-1", 0)) as batches:
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.wait({waiting}, timeout=0.1)
        async with there.write() as session:
            await writer.append(session, "job-1", [b"from there"])
        assert [event.payload for event in await asyncio.wait_for(waiting, timeout=10)] == [b"from there"]
    await here.close()
    await there.close()
