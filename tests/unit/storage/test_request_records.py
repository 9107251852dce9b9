"""Idempotency: one id, one piece of work, for 24 hours."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from slipstream_server.errors import InvalidField, RequestIdReused
from slipstream_server.storage import request_records
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.migrations import migrate
from slipstream_server.storage.request_records import Remembered, RequestKey
from unit.storage.shelf import SCHEMA, requests


def key(request: bytes = b"make a shelf", **changed: str) -> RequestKey:
    parts = {"owner": "ada", "method": "CreateShelf", "request_id": "r-1"} | changed
    return RequestKey.of(request=request, **parts)


@pytest.fixture
async def db(database: Database) -> Database:
    await migrate(database, SCHEMA)
    return database


async def claim(db: Database, wanted: RequestKey) -> Remembered | None:
    async with db.write() as session:
        return await requests.get_or_claim(session, wanted)


async def answer(db: Database, wanted: RequestKey, response: bytes) -> None:
    async with db.write() as session:
        await requests.answer(session, wanted, response)


async def test_the_first_claims_and_a_repeat_gets_its_answer(db: Database) -> None:
    assert await claim(db, key()) is None
    assert await claim(db, key()) == Remembered(None)
    await answer(db, key(), b"\x00shelf a")
    assert await claim(db, key()) == Remembered(b"\x00shelf a")


async def test_of_many_at_once_one_claims(db: Database) -> None:
    outcomes = await asyncio.gather(*(claim(db, key()) for _ in range(20)))
    assert outcomes.count(None) == 1
    assert outcomes.count(Remembered(None)) == 19


async def test_the_same_id_for_another_request_is_refused(db: Database) -> None:
    await claim(db, key())
    with pytest.raises(RequestIdReused, match="r-1"):
        await claim(db, key(b"make a table"))


@pytest.mark.parametrize("changed", [{"owner": "bob"}, {"method": "CreateTable"}, {"request_id": "r-2"}])
async def test_ids_of_others_are_their_own(db: Database, changed: dict[str, str]) -> None:
    await claim(db, key())
    assert await claim(db, key(b"something else", **changed)) is None


async def test_work_that_was_rolled_back_is_not_remembered(db: Database) -> None:
    with pytest.raises(RuntimeError):
        async with db.write() as session:
            await requests.get_or_claim(session, key())
            await requests.answer(session, key(), b"done")
            raise RuntimeError
    assert await claim(db, key()) is None


async def test_a_claim_given_up_can_be_made_again(db: Database) -> None:
    await claim(db, key())
    async with db.write() as session:
        await requests.forget(session, key())
    assert await claim(db, key(b"another")) is None


async def test_looking_claims_nothing_and_needs_no_write(db: Database) -> None:
    async def look(wanted: RequestKey) -> Remembered | None:
        async with db.read() as session:
            return await requests.get(session, wanted)

    assert await look(key()) is None
    assert await claim(db, key()) is None
    await answer(db, key(), b"done")
    assert await look(key()) == Remembered(b"done")
    with pytest.raises(RequestIdReused, match="r-1"):
        await look(key(b"make a table"))


async def test_an_answer_is_kept_for_24_hours_and_no_longer(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    start = utc_now()
    await claim(db, key())
    await answer(db, key(), b"done")
    monkeypatch.setattr(request_records, "utc_now", lambda: start + timedelta(hours=23, minutes=59))
    assert await claim(db, key()) == Remembered(b"done")
    monkeypatch.setattr(request_records, "utc_now", lambda: start + timedelta(hours=24, minutes=1))
    assert await claim(db, key(b"another")) is None


async def test_purging_drops_only_what_expired(db: Database) -> None:
    await claim(db, key())
    for when, left in ((utc_now() + timedelta(hours=23), 1), (utc_now() + timedelta(hours=25), 0)):
        async with db.write() as session:
            await requests.purge(session, when)
            assert (await session.execute(select(func.count()).select_from(requests.table))).scalar_one() == left


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a\0b", "line\nbreak", "\ud800"])
def test_a_bad_request_id_is_refused(request_id: str) -> None:
    with pytest.raises(InvalidField, match="request_id"):
        key(request_id=request_id)


def test_any_printable_text_is_a_request_id() -> None:
    assert key(request_id="Bestellung Nº 7 – zweiter Versuch").request_id == "Bestellung Nº 7 – zweiter Versuch"
