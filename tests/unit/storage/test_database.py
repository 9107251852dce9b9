"""The database's promises, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import asyncio
import getpass
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from slipstream_server.errors import DependencyUnavailable, InvalidField, StorageFull
from slipstream_server.storage.database import Database, DatabaseConfig, after_commit
from slipstream_server.storage.migrations import migrate
from unit.storage.conftest import PostgresServer, fresh_postgres_database
from unit.storage.shelf import SCHEMA, Book, Shelf

VISIT = """
import asyncio, sys
from unit.storage.shelf import Shelf
from slipstream_server.storage.database import Database, DatabaseConfig

async def main():
    database = Database(DatabaseConfig(dsn=sys.argv[1], lock_timeout_s=60))
    for _ in range(100):
        async with database.write() as session:
            shelf = await session.get_one(Shelf, "a")
            shelf.num_visits = shelf.num_visits + 1
    await database.close()

asyncio.run(main())
"""
HOLD = """
import asyncio, sys
from sqlalchemy import text
from slipstream_server.storage.database import Database, DatabaseConfig

async def main():
    database = Database(DatabaseConfig(dsn=sys.argv[1]))
    async with database.write() as session:
        await session.execute(text("UPDATE shelves SET num_visits = 1000"))
        print("held", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
async def shelves(database: Database) -> Database:
    """A migrated database with the empty shelf ``a``."""
    await migrate(database, SCHEMA)
    async with database.write() as session:
        session.add(Shelf(shelf_id="a"))
    return database


async def visits(database: Database) -> int:
    async with database.read() as session:
        return (await session.execute(select(Shelf.num_visits).where(Shelf.shelf_id == "a"))).scalar_one()


async def visit(database: Database, times: int = 1) -> None:
    async with database.write() as session:
        shelf = await session.get_one(Shelf, "a")
        shelf.num_visits += times


def test_three_processes_lose_no_update(dsn: str) -> None:
    asyncio.run(_prepare(dsn))
    processes = [_python(VISIT, dsn) for _ in range(3)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    assert asyncio.run(_visits_of(dsn)) == 300


async def test_concurrent_tasks_lose_no_update(shelves: Database) -> None:
    await asyncio.gather(*(visit(shelves) for _ in range(40)))
    assert await visits(shelves) == 40


async def test_an_error_in_the_block_stores_nothing(shelves: Database) -> None:
    with pytest.raises(RuntimeError):
        async with shelves.write() as session:
            session.add(Shelf(shelf_id="b"))
            await session.flush()
            raise RuntimeError
    async with shelves.read() as session:
        assert (await session.scalars(select(Shelf.shelf_id))).all() == ["a"]


async def test_a_broken_constraint_is_the_callers_to_name(shelves: Database) -> None:
    with pytest.raises(IntegrityError):
        async with shelves.write() as session:
            session.add(Shelf(shelf_id="a"))
    with pytest.raises(IntegrityError):  # foreign keys hold on SQLite too
        async with shelves.write() as session:
            session.add(Book(book_id="b", shelf_id="nowhere"))


async def test_a_read_session_cannot_write(shelves: Database) -> None:
    with pytest.raises(DBAPIError):
        async with shelves.read() as session:
            await session.execute(text("DELETE FROM shelves"))
    assert await visits(shelves) == 0


async def test_a_read_session_is_a_snapshot(shelves: Database) -> None:
    async with shelves.read() as session:
        count = select(Shelf.num_visits)
        before = (await session.execute(count)).scalar_one()
        await visit(shelves)
        assert (await session.execute(count)).scalar_one() == before
    assert await visits(shelves) == before + 1


async def test_a_cancelled_write_leaves_nothing_and_no_lock(shelves: Database) -> None:
    inside = asyncio.Event()

    async def stuck() -> None:
        async with shelves.write() as session:
            await session.execute(text("UPDATE shelves SET num_visits = 1000"))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stuck())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await visit(shelves)
    assert await visits(shelves) == 1


async def test_a_write_cancelled_at_any_moment_is_whole_or_absent(shelves: Database) -> None:
    for delay_ms in range(12):
        task = asyncio.create_task(visit(shelves))
        await asyncio.wait({task}, timeout=delay_ms / 1000)
        before = await visits(shelves)
        task.cancel()
        await asyncio.wait({task})
        await visit(shelves, times=10)
        assert await visits(shelves) - before in (10, 11)


async def test_a_connection_closed_within_a_statement_gives_the_lock_back(tmp_path: Path) -> None:
    """As where a task is cancelled while it reads: its traceback keeps the statement alive."""
    one, other = (Database(DatabaseConfig.sqlite(tmp_path / "a.db")) for _ in range(2))
    async with one._writers.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await connection.execute(text("CREATE TABLE kept (number INTEGER)"))
        cursor = await driver.execute("SELECT 1 UNION ALL SELECT 2")
        assert await cursor.fetchone() == (1,)
        await driver.close()
        async with other.write() as session:
            await session.execute(text("CREATE TABLE kept (number INTEGER)"))
        assert cursor is not None
        await connection.invalidate()
    await one.close()
    await other.close()


async def test_after_commit_runs_only_after_a_commit(shelves: Database) -> None:
    ran: list[str] = []
    with pytest.raises(RuntimeError):
        async with shelves.write() as session:
            after_commit(session, lambda: ran.append("rolled back"))
            raise RuntimeError
    async with shelves.write() as session:
        after_commit(session, lambda: ran.append("committed"))
        assert ran == []
    assert ran == ["committed"]


async def test_a_commit_that_has_begun_is_told_even_when_its_task_is_cancelled(shelves: Database) -> None:
    told = asyncio.Event()
    committing = asyncio.Event()

    async def write() -> None:
        async with shelves.write() as session:
            await session.execute(text("UPDATE shelves SET num_visits = 7"))
            after_commit(session, told.set)
            event.listen(session.sync_session, "before_commit", lambda _session: committing.set())

    task = asyncio.create_task(write())
    await committing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told.is_set()
    assert await visits(shelves) == 7


async def test_a_writer_that_holds_on_makes_others_unavailable_in_time(dsn: str) -> None:
    await _prepare(dsn)
    database = Database(DatabaseConfig(dsn=dsn, lock_timeout_s=0.3))
    holder = _python(HOLD, dsn)
    try:
        await asyncio.to_thread(_read_line, holder)
        with pytest.raises(DependencyUnavailable):
            await asyncio.wait_for(visit(database), timeout=5)
        assert await visits(database) == 0
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    await _until_available(database)
    assert await visits(database) == 1
    await database.close()


async def test_a_writer_of_this_process_that_holds_on_makes_others_unavailable(dsn: str) -> None:
    await _prepare(dsn)
    database = Database(DatabaseConfig(dsn=dsn, lock_timeout_s=0.2))
    async with database.write():
        with pytest.raises(DependencyUnavailable):
            await visit(database)
    await visit(database)
    assert await visits(database) == 1
    await database.close()


async def test_more_readers_than_connections_wait_their_turn(shelves: Database) -> None:
    assert await asyncio.gather(*(visits(shelves) for _ in range(50))) == [0] * 50


async def test_sqlite_runs_as_promised(tmp_path: Path) -> None:
    database = Database(DatabaseConfig.sqlite(tmp_path / "new folder" / "a?b%20.db"))
    async with database.write() as session:
        pragmas = {
            name: (await session.execute(text(f"PRAGMA {name}"))).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    await database.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    assert (tmp_path / "new folder" / "a?b%20.db").exists()


async def test_a_full_disk_refuses_writes_and_reads_go_on(small_disk: Path) -> None:
    database = Database(DatabaseConfig.sqlite(small_disk / "service.db"))
    await migrate(database, SCHEMA)
    acknowledged: list[str] = []
    with pytest.raises(StorageFull):
        for number in range(1000):
            async with database.write() as session:
                session.add(Shelf(shelf_id=f"{number}", owner="o" * 200))
            acknowledged.append(f"{number}")
    assert await _shelf_ids(database) == sorted(acknowledged)
    with pytest.raises(StorageFull):
        await _add_big_shelf(database)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    await _add_big_shelf(database)
    assert await _shelf_ids(database) == sorted([*acknowledged, "big"])
    await database.close()
    with sqlite3.connect(small_disk / "service.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_full_disk_of_postgres_is_named(postgres: PostgresServer, small_disk: Path) -> None:
    dsn = await asyncio.to_thread(fresh_postgres_database, postgres)
    _open_to(postgres.user, small_disk)
    administrator = await asyncpg.connect(dsn)
    await administrator.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    database = Database(DatabaseConfig(dsn=dsn))
    async with database.write() as session:
        await session.execute(text("CREATE TABLE heap (x TEXT) TABLESPACE small"))
    with pytest.raises(StorageFull):
        async with database.write() as session:
            await session.execute(text("INSERT INTO heap SELECT md5(i::text) FROM generate_series(1, 100000) AS i"))
    async with database.read() as session:
        assert (await session.execute(text("SELECT count(*) FROM heap"))).scalar_one() == 0
    await database.close()
    await administrator.execute("DROP TABLE heap")
    await administrator.execute("DROP TABLESPACE small")
    await administrator.close()


async def test_a_restarted_postgres_is_unavailable_then_back(postgres: PostgresServer) -> None:
    dsn = await asyncio.to_thread(fresh_postgres_database, postgres)
    await _prepare(dsn)
    database = Database(DatabaseConfig(dsn=dsn, connect_timeout_s=2))
    await visit(database)
    with pytest.raises(DependencyUnavailable):
        async with database.write() as session:
            await session.execute(text("UPDATE shelves SET num_visits = 1000"))
            await asyncio.to_thread(postgres.stop)
            await session.execute(text("UPDATE shelves SET num_visits = 2000"))
    with pytest.raises(DependencyUnavailable):
        await visits(database)
    await asyncio.to_thread(postgres.start)
    assert await visits(database) == 1
    await visit(database)
    assert await visits(database) == 2
    await database.close()


@pytest.mark.parametrize(
    "dsn_text", ["", "mysql://host/db", "sqlite://", "sqlite:///:memory:", "/plain/path", "http://[::1"]
)
def test_a_dsn_that_is_none_is_refused(dsn_text: str) -> None:
    with pytest.raises(InvalidField, match=r"database\.dsn"):
        DatabaseConfig(dsn=dsn_text)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(InvalidField, match="lock_timeout_s"):
        DatabaseConfig(dsn="sqlite:///a.db", lock_timeout_s=value)


async def test_errors_hold_no_password_and_no_path(tmp_path: Path) -> None:
    database = Database(DatabaseConfig(dsn="postgresql://someone:hunter2@127.0.0.1:1/none", connect_timeout_s=1))
    with pytest.raises(DependencyUnavailable) as caught:
        await visits(database)
    assert "hunter2" not in str(caught.value)
    assert "/" not in str(caught.value)
    await database.close()


def _open_to(user: str | None, folder: Path) -> None:
    """Let the server's user reach ``folder`` and own it."""
    if user is not None:
        shutil.chown(folder, user)
    for parent in list(folder.parents)[:4]:
        if parent.owner() == getpass.getuser() and parent.name:
            parent.chmod(parent.stat().st_mode | 0o011)


def _python(program: str, dsn: str) -> subprocess.Popen[str]:
    tests = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", program, dsn], stdout=subprocess.PIPE, text=True, cwd=tests)


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


async def _prepare(dsn: str) -> None:
    database = Database(DatabaseConfig(dsn=dsn))
    await migrate(database, SCHEMA)
    async with database.write() as session:
        session.add(Shelf(shelf_id="a"))
    await database.close()


async def _visits_of(dsn: str) -> int:
    database = Database(DatabaseConfig(dsn=dsn))
    try:
        return await visits(database)
    finally:
        await database.close()


async def _until_available(database: Database) -> None:
    for _ in range(50):
        try:
            return await visit(database)
        except DependencyUnavailable:
            continue
    raise AssertionError("the lock of a dead writer was never given back")


async def _shelf_ids(database: Database) -> list[str]:
    async with database.read() as session:
        return sorted((await session.scalars(select(Shelf.shelf_id))).all())


async def _add_big_shelf(database: Database) -> None:
    async with database.write() as session:
        session.add(Shelf(shelf_id="big", owner="o" * 100_000))
