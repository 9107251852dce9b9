"""Pages: complete, stable while rows come and go, and tokens that fit their query alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, select

from slipstream_server.errors import InvalidField
from slipstream_server.storage.database import Database
from slipstream_server.storage.migrations import migrate
from slipstream_server.storage.pages import PageRequest, decode_token, encode_token, read_page
from unit.storage.shelf import SCHEMA, Book, Shelf

QUERY = ("ListBooks", "shelves/a", "ada")
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
async def db(database: Database) -> Database:
    await migrate(database, SCHEMA)
    async with database.write() as session:
        session.add(Shelf(shelf_id="a"))
        await session.flush()
        # Ranks and times repeat, so that the id decides within them.
        session.add_all(book(f"b{n:03}", rank=n % 3, hours=n % 5) for n in range(0, 240, 2))
    return database


def book(book_id: str, rank: int = 0, hours: int = 0) -> Book:
    made = START + timedelta(hours=hours)
    return Book(book_id=book_id, shelf_id="a", rank=rank, create_time=made, update_time=made)


async def page_of(db: Database, token: str = "", size: int = 0, descending: bool = False, by_time: bool = False):
    key = [Book.update_time if by_time else Book.rank, Book.book_id]
    async with db.read() as session:
        request = PageRequest(query=QUERY, page_size=size, page_token=token)
        page = await read_page(session, select(Book), key, request, descending=descending)
    return [row.book_id for row in page.items], page.next_page_token


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("size", [1, 7, 119, 120, 121, 1000])
async def test_pages_together_are_the_whole_list_in_order(
    db: Database, size: int, descending: bool, by_time: bool
) -> None:
    expected = sorted(((n % 5 if by_time else n % 3, f"b{n:03}") for n in range(0, 240, 2)), reverse=descending)
    found: list[str] = []
    token, num_pages = "", 0
    while token or not num_pages:
        ids, token = await page_of(db, token, size, descending, by_time)
        assert len(ids) <= size
        found += ids
        num_pages += 1
    assert found == [book_id for _, book_id in expected]
    assert num_pages == -(-120 // size)


async def test_the_default_size_is_50(db: Database) -> None:
    ids, token = await page_of(db)
    assert len(ids) == 50
    assert token


async def test_rows_that_come_and_go_shift_nothing(db: Database) -> None:
    first, token = await page_of(db, size=20)
    async with db.write() as session:
        session.add(book("b001", rank=0))  # before the position: not shown again later
        session.add(book("zzz", rank=2))  # after it: shown
        await session.execute(delete(Book).where(Book.book_id == first[-1]))  # the row the token stands on
    rest, _ = await page_of(db, token, size=1000)
    before = sorted((n % 3, f"b{n:03}") for n in range(0, 240, 2))[20:]
    assert rest == [book_id for _, book_id in before] + ["zzz"]


@pytest.mark.parametrize("size", [-1, 1001, 2**31, 2**63 - 1])
def test_a_page_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InvalidField, match=f"page_size: {size} "):
        PageRequest(query=QUERY, page_size=size).num_rows()


TOKEN = encode_token(QUERY, (1, "b002", START))


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "AAAA",
        "../x",
        "a\0b",
        "а" * 20,
        "=",
        TOKEN[:-1],
        TOKEN + "A",
        "!" + TOKEN,
        "A" * 4097,
        "A" * 4096,
    ]
    + [TOKEN[:at] + ("A" if TOKEN[at] != "A" else "B") + TOKEN[at + 1 :] for at in range(len(TOKEN) - 1)],
)
def test_a_token_that_was_altered_or_made_up_is_refused(token: str) -> None:
    with pytest.raises(InvalidField, match="page_token"):
        PageRequest(query=QUERY, page_token=token).position()


@pytest.mark.parametrize(
    "query", [("ListBooks", "shelves/b", "ada"), QUERY[:2], (*QUERY, ""), ("ListBooks", "shelves/a", "bob")]
)
def test_a_token_of_another_query_is_refused(query: tuple[str, ...]) -> None:
    with pytest.raises(InvalidField, match="page_token"):
        decode_token(query, TOKEN)


@given(st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(), st.datetimes(timezones=st.just(UTC))))
def test_a_position_survives_its_token(position: tuple[int, str, datetime]) -> None:
    assert decode_token(QUERY, encode_token(QUERY, position)) == position
