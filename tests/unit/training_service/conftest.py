"""A migrated database for the rooms of the training service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate
from slipstream_server.training.tables import SCHEMA


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(DatabaseConfig.sqlite(tmp_path / "training.db"))
    await migrate(database, SCHEMA)
    yield database
    await database.close()
