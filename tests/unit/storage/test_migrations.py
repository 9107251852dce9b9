"""Migrations: the tables come out as declared, processes take turns, newer and foreign databases are refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from slipstream_server.errors import SchemaTooNew, WrongState
from slipstream_server.storage.database import Database
from slipstream_server.storage.migrations import drift, migrate
from unit.storage.shelf import SCHEMA

START = """
import asyncio, sys
from unit.storage.shelf import SCHEMA
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate

async def main():
    print("up", flush=True)
    sys.stdin.readline()
    database = Database(DatabaseConfig(dsn=sys.argv[1]))
    print(await migrate(database, SCHEMA))
    await database.close()

asyncio.run(main())
"""


async def test_a_fresh_database_gets_the_declared_tables(database: Database) -> None:
    assert await migrate(database, SCHEMA) == "shelf_0002"
    assert await drift(database, SCHEMA) == []


async def test_drift_names_a_table_that_no_revision_makes(database: Database) -> None:
    await migrate(database, SCHEMA)
    async with database.write() as session:
        await session.execute(text("DROP TABLE books"))
    assert "books" in str(await drift(database, SCHEMA))


async def test_migrating_twice_changes_nothing(database: Database) -> None:
    await migrate(database, SCHEMA)
    assert await migrate(database, SCHEMA) == "shelf_0002"


async def test_an_older_database_is_upgraded_with_its_rows(database: Database) -> None:
    async with database.migrating() as session:
        await (await session.connection()).run_sync(SCHEMA.upgrade, "shelf_0001")
        await session.execute(text("INSERT INTO shelves VALUES ('a', 'anonymous', 1, 1)"))
        await session.execute(text("INSERT INTO books VALUES ('b', 'a', 1, 'anonymous', 1, 1)"))
    await migrate(database, SCHEMA)
    async with database.read() as session:
        assert (await session.execute(text("SELECT shelf_id, num_visits FROM shelves"))).all() == [("a", 0)]
        assert (await session.execute(text("SELECT book_id, shelf_id FROM books"))).all() == [("b", "a")]


async def test_a_newer_database_is_refused_and_left_alone(database: Database) -> None:
    await migrate(database, SCHEMA)
    async with database.write() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = 'shelf_0099'"))
    with pytest.raises(SchemaTooNew, match="shelf_0099"):
        await migrate(database, SCHEMA)
    async with database.read() as session:
        assert (await session.execute(text("SELECT version_num FROM alembic_version"))).scalar_one() == "shelf_0099"


async def test_another_services_database_is_refused(database: Database, tmp_path: Path) -> None:
    (tmp_path / "chat_0001_create.py").write_text("revision, down_revision = 'chat_0001', None\ndef upgrade(): pass\n")
    await migrate(database, SCHEMA)
    with pytest.raises(WrongState, match="chat"):
        await migrate(database, replace(SCHEMA, service="chat", versions=tmp_path))


async def test_a_failing_revision_leaves_the_old_schema(database: Database, tmp_path: Path) -> None:
    for file in SCHEMA.versions.glob("shelf_*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "shelf_0003_break.py").write_text(
        "from alembic import op\nrevision, down_revision = 'shelf_0003', 'shelf_0002'\n"
        "def upgrade():\n    op.execute('CREATE TABLE half (x INTEGER)')\n    raise RuntimeError('broken')\n"
    )
    await migrate(database, SCHEMA)
    with pytest.raises(RuntimeError, match="broken"):
        await migrate(database, replace(SCHEMA, versions=tmp_path))
    assert await drift(database, SCHEMA) == []
    assert await migrate(database, SCHEMA) == "shelf_0002"


def test_processes_that_start_at_once_take_turns(dsn: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, dsn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_tests()
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["shelf_0002"] * 3


def _tests() -> Path:
    return Path(__file__).parents[2]
