"""Stored models: what a change is, what is remembered of requests, and that the tables are what the revisions make."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from slipstream_server.errors import ModelLoadFailed, ModelNotFound, RequestIdReused, ResourceExists, StaleEtag
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.model_records import ModelRecords, NewModel
from slipstream_server.inference.tables import SCHEMA
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import drift, migrate
from slipstream_server.storage.request_records import RequestKey

CHOICE = LoadChoice(quantization="nf4", double_quantization=True, context_tokens=64, prefix_caching=False)
MODEL = NewModel(id="tiny", source="org/tiny", locator="org/tiny@main", options=CHOICE, owner="ada")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(DatabaseConfig.sqlite(tmp_path / "inference.db"))
    await migrate(database, SCHEMA)
    yield database
    await database.close()


async def test_the_revisions_make_the_declared_tables(database: Database) -> None:
    assert await drift(database, SCHEMA) == []


async def test_what_is_stored_is_read_by_the_next_process(database: Database) -> None:
    records = ModelRecords(database)
    await records.add(MODEL)
    await records.change("tiny", wanted=True, folder="somewhere")
    again = ModelRecords(database)
    await again.read()
    assert again.by_name == records.by_name
    assert (again.get("tiny").options, again.get("tiny").owner) == (CHOICE, "ada")
    with pytest.raises(ResourceExists):
        await again.add(MODEL)


async def test_a_change_of_the_wish_changes_the_etag_and_a_note_does_not(database: Database) -> None:
    records = ModelRecords(database)
    heard: list[str] = []
    records.on_change = heard.append
    first = await records.add(MODEL)
    noted = await records.fail("tiny", ModelLoadFailed("no"))
    assert (noted.etag, noted.error_reason) == (first.etag, "MODEL_LOAD_FAILED")
    changed = await records.change("tiny", etag=first.etag, pinned=True)
    assert changed.etag != first.etag
    with pytest.raises(StaleEtag):
        await records.change("tiny", etag=first.etag, pinned=False)
    with pytest.raises(StaleEtag):
        await records.remove("tiny", etag=first.etag)
    assert records.get("tiny").pinned
    assert heard == ["tiny"] * 3
    with pytest.raises(ModelNotFound, match="did you mean 'tiny'"):
        records.get("tini")
    await records.remove("tiny", etag=changed.etag)
    with pytest.raises(ModelNotFound):
        records.get("tiny")


async def test_a_request_is_remembered_with_what_it_did(database: Database) -> None:
    records = ModelRecords(database)

    def key(request: bytes) -> RequestKey:
        return RequestKey.of(owner="ada", method="LoadModel", request_id="once", request=request)

    async with database.write():  # it asks while others write
        assert await records.answered(key(b"a")) is None
    await records.add(MODEL, key=key(b"a"))
    assert await records.answered(key(b"a")) == "tiny"
    with pytest.raises(RequestIdReused):
        await records.answered(key(b"b"))
