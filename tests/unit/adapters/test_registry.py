"""The registry on both databases: its schema, and many writers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from tests.unit.adapters.lora_files import lora_files, sha256

from slipstream_server.adapters.aliases import Aliases, GateUse, Move
from slipstream_server.adapters.intake import AnnouncedFile, BaseModel, Chunk, Intake
from slipstream_server.adapters.journal import Change, Journal
from slipstream_server.adapters.references import Reference
from slipstream_server.adapters.tables import SCHEMA
from slipstream_server.adapters.versions import VersionDetails, Versions
from slipstream_server.adapters.watching import Watching
from slipstream_server.errors import StaleGeneration
from slipstream_server.resource_names import AdapterAliasName
from slipstream_server.storage.artifacts import open_store
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import drift, migrate

LIVE = AdapterAliasName("support", "live")


def encode(change: Change) -> bytes:
    return type(change).__name__.encode()


async def test_the_revisions_make_what_the_tables_declare(dsn: str) -> None:
    database = Database(DatabaseConfig(dsn=dsn))
    try:
        await migrate(database, SCHEMA)
        assert await drift(database, SCHEMA) == []
    finally:
        await database.close()


async def test_writers_in_several_processes_lose_no_move(dsn: str, tmp_path: Path) -> None:
    """Each writer has connections of its own, as a process has."""
    databases = [Database(DatabaseConfig(dsn=dsn)) for _ in range(4)]
    store = open_store(str(tmp_path / "store"))
    try:
        await migrate(databases[0], SCHEMA)
        await asyncio.gather(*(upload(databases[seed], Intake(store), seed) for seed in range(4)))
        journal = Journal(encode)
        won: list[int] = []

        async def compete(number: int) -> None:
            aliases = Aliases(databases[number], journal)
            for _ in range(5):
                expected = max(won, default=0)
                while True:
                    move = Move(by="me", expected_generation=expected)
                    try:
                        await aliases.set(LIVE, Reference(adapter="support", number=number + 1), move, GateUse())
                    except StaleGeneration as error:
                        expected = int(error.metadata["generation"])
                        continue
                    won.append(expected + 1)
                    break

        await asyncio.gather(*(compete(number) for number in range(4)))
        assert sorted(won) == list(range(1, 21))
        snapshot = await Watching(databases[0]).snapshot()
        # One adapter, four versions, twenty moves.
        assert snapshot.sequence == 25
        assert (snapshot.aliases[0].generation, len(snapshot.versions)) == (20, 4)
    finally:
        store.close()
        for database in databases:
            await database.close()


async def upload(database: Database, intake: Intake, seed: int) -> None:
    files = lora_files(seed)
    announced = [AnnouncedFile(path=path, size_bytes=len(data), sha256=sha256(data)) for path, data in files.items()]

    async def chunks() -> AsyncIterator[Chunk]:
        for index, data in enumerate(files.values()):
            yield Chunk(file_index=index, offset_bytes=0, data=data)

    received = await intake.receive(announced, chunks(), BaseModel())
    await Versions(database, Journal(encode)).register("me", "support", received, VersionDetails(), create_missing=True)
