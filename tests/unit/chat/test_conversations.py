"""Conversations: made once, listed newest first, changed under their etag, gone with their messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from slipstream_server.chat.conversations import Conversations, ConversationSettings
from slipstream_server.chat.tables import SCHEMA
from slipstream_server.errors import (
    ConversationNotFound,
    InvalidField,
    MessageNotFound,
    ResourceExists,
    StaleEtag,
)
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate
from slipstream_server.storage.request_records import RequestKey

ADA, BOB = "ada", "bob"


@pytest.fixture
async def conversations(tmp_path: Path) -> AsyncIterator[Conversations]:
    database = Database(DatabaseConfig.sqlite(tmp_path / "chat.db"))
    await migrate(database, SCHEMA)
    yield Conversations(database)
    await database.close()


async def test_what_was_chosen_comes_back(conversations: Conversations) -> None:
    settings = ConversationSettings(
        title="Trip", model="m", adapter="a@live", system_message="Be brief.", labels={"k": "v"}
    )
    made = await conversations.create(ADA, settings, conversation_id="trip")
    read = await conversations.get(ADA, "trip")
    assert made == read
    assert (read.id, read.owner, read.settings, read.num_messages) == ("trip", ADA, settings, 0)


async def test_an_id_is_taken_once(conversations: Conversations) -> None:
    await conversations.create(ADA, ConversationSettings(), conversation_id="one")
    with pytest.raises(ResourceExists):
        await conversations.create(BOB, ConversationSettings(), conversation_id="one")


async def test_a_repeated_request_makes_no_second_conversation(conversations: Conversations) -> None:
    key = RequestKey.of(owner=ADA, method="CreateConversation", request_id="r", request=b"x")
    first = await conversations.create(ADA, ConversationSettings(), key=key)
    again = await conversations.create(ADA, ConversationSettings(), key=key)
    assert first.id == again.id
    assert len((await conversations.list(ADA, 0, "")).items) == 1


async def test_an_owner_sees_only_their_own_newest_first(conversations: Conversations) -> None:
    for name in ("first", "second", "third"):
        await conversations.create(ADA, ConversationSettings(), conversation_id=name)
    await conversations.create(BOB, ConversationSettings(), conversation_id="other")
    await conversations.update(ADA, "first", {"title": "moved up"}, "")
    page = await conversations.list(ADA, 2, "")
    rest = await conversations.list(ADA, 2, page.next_page_token)
    assert [item.id for item in (*page.items, *rest.items)] == ["first", "third", "second"]
    assert rest.next_page_token == ""


async def test_an_update_changes_what_it_names_and_nothing_else(conversations: Conversations) -> None:
    await conversations.create(ADA, ConversationSettings(title="old", model="m"), conversation_id="c")
    changed = await conversations.update(ADA, "c", {"title": "new", "metadata": {"a": "b"}}, "")
    assert changed.settings == ConversationSettings(title="new", model="m", labels={"a": "b"})


async def test_a_stale_etag_changes_and_deletes_nothing(conversations: Conversations) -> None:
    made = await conversations.create(ADA, ConversationSettings(), conversation_id="c")
    await conversations.update(ADA, "c", {"title": "newer"}, made.etag)
    with pytest.raises(StaleEtag):
        await conversations.update(ADA, "c", {"title": "lost"}, made.etag)
    with pytest.raises(StaleEtag):
        await conversations.delete(ADA, "c", made.etag)
    assert (await conversations.get(ADA, "c")).settings.title == "newer"


async def test_deleting_is_for_good(conversations: Conversations) -> None:
    await conversations.create(ADA, ConversationSettings(), conversation_id="c")
    await conversations.delete(ADA, "c", "")
    with pytest.raises(ConversationNotFound):
        await conversations.get(ADA, "c")


async def test_an_unknown_message_is_named(conversations: Conversations) -> None:
    await conversations.create(ADA, ConversationSettings(), conversation_id="c")
    with pytest.raises(MessageNotFound):
        await conversations.message(ADA, "c", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", "x" * 257),
        ("title", "nul\0"),
        ("system_message", "x" * 65_537),
        ("labels", {"k" * 64: "v"}),
        ("labels", {str(i): "" for i in range(65)}),
    ],
)
def test_what_is_too_long_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidField):
        ConversationSettings(**{field: value})  # type: ignore[arg-type]
