"""Stored conversations: made, read, changed and deleted by their owner. Turns are in ``turns.py``.

Another owner's conversation does not exist. Lives on the service's event loop.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.chat.tables import REQUESTS, ConversationRow, MessageRow
from slipstream_server.errors import ConversationNotFound, InvalidField, MessageNotFound, ResourceExists, StaleEtag
from slipstream_server.resource_names import ModelName, check_id, parse_adapter_reference
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.pages import Page, PageRequest, read_page
from slipstream_server.storage.request_records import RequestKey

MAX_TITLE_CHARS = 256
MAX_SYSTEM_BYTES = 64 * 1024
MAX_NAME_CHARS = 256
MAX_LABELS = 64
CHANGEABLE = ("title", "model", "adapter", "system_message", "metadata")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationSettings:
    """What an owner chooses. ``labels`` are the contract's ``metadata``."""

    title: str = ""
    model: str = ""
    adapter: str = ""
    system_message: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _bounded("title", self.title, MAX_TITLE_CHARS)
        _bounded("model", self.model, MAX_NAME_CHARS)
        _bounded("adapter", self.adapter, MAX_NAME_CHARS)
        _bounded("system_message", self.system_message, MAX_SYSTEM_BYTES)
        _check_references(self)
        if len(self.labels) > MAX_LABELS:
            raise InvalidField.of("conversation.metadata", f"has {len(self.labels)} entries; at most {MAX_LABELS}")
        for key, value in self.labels.items():
            if not 1 <= len(key) <= 63 or len(value) > 1024:
                raise InvalidField.of("conversation.metadata", "keys have 1 to 63 characters, values at most 1024")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A stored conversation."""

    id: str
    owner: str
    settings: ConversationSettings
    num_messages: int
    create_time: datetime
    update_time: datetime
    etag: str


class Conversations:
    """The conversations of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, owner: str, settings: ConversationSettings, *, conversation_id: str = "", key: RequestKey | None = None
    ) -> Conversation:
        """A new, empty conversation; for a repeated ``key`` the one that was made for it.

        Raises ResourceExists, RequestIdReused, ConversationNotFound (repeated, but deleted since).
        """
        async with self._database.write() as session:
            if key is not None and (known := await REQUESTS.get_or_claim(session, key)) is not None:
                return _conversation(await find(session, owner, (known.response or b"").decode()))
            row = ConversationRow(id=conversation_id or f"c{secrets.token_hex(12)}", owner=owner, **_columns(settings))
            if await session.get(ConversationRow, row.id) is not None:
                raise ResourceExists(f"conversation_id: a conversation {row.id!r} exists; choose another id")
            session.add(row)
            if key is not None:
                await REQUESTS.answer(session, key, row.id.encode())
            await session.flush()
            return _conversation(row)

    async def get(self, owner: str, conversation_id: str) -> Conversation:
        """Raises ConversationNotFound."""
        async with self._database.read() as session:
            return _conversation(await find(session, owner, conversation_id))

    async def list(self, owner: str, page_size: int, page_token: str) -> Page[Conversation]:
        """The owner's conversations, the last updated first."""
        page = PageRequest(query=("conversations", owner), page_size=page_size, page_token=page_token)
        rows = select(ConversationRow).where(ConversationRow.owner == owner)
        key = (ConversationRow.update_time, ConversationRow.id)
        async with self._database.read() as session:
            found = await read_page(session, rows, key, page, descending=True)
        return Page(tuple(_conversation(row) for row in found.items), found.next_page_token)

    async def update(self, owner: str, conversation_id: str, changes: Mapping[str, Any], etag: str) -> Conversation:
        """Set the fields in ``changes`` (names of CHANGEABLE). Raises ConversationNotFound, StaleEtag, InvalidField."""
        async with self._database.write() as session:
            row = await find(session, owner, conversation_id)
            _check_etag(row, etag)
            current = _settings(row)
            merged = {name: getattr(current, name) for name in current.__slots__}
            merged |= {"labels" if name == "metadata" else name: value for name, value in changes.items()}
            for column, value in _columns(ConversationSettings(**merged)).items():
                setattr(row, column, value)
            row.generation += 1
            await session.flush()
            return _conversation(row)

    async def delete(self, owner: str, conversation_id: str, etag: str) -> None:
        """The conversation and its messages. Raises ConversationNotFound, StaleEtag."""
        async with self._database.write() as session:
            row = await find(session, owner, conversation_id)
            _check_etag(row, etag)
            await session.execute(delete(ConversationRow).where(ConversationRow.id == row.id))

    async def messages(self, owner: str, conversation_id: str, page_size: int, page_token: str) -> Page[MessageRow]:
        """A page of messages, oldest first. Raises ConversationNotFound."""
        page = PageRequest(query=("messages", owner, conversation_id), page_size=page_size, page_token=page_token)
        rows = select(MessageRow).where(MessageRow.conversation == conversation_id)
        async with self._database.read() as session:
            await find(session, owner, conversation_id)
            return await read_page(session, rows, (MessageRow.sequence,), page)

    async def message(self, owner: str, conversation_id: str, sequence: int) -> MessageRow:
        """Raises ConversationNotFound, MessageNotFound."""
        async with self._database.read() as session:
            await find(session, owner, conversation_id)
            row = await session.get(MessageRow, (conversation_id, sequence))
        if row is None:
            raise MessageNotFound(f"conversation {conversation_id} has no message {sequence}")
        return row


async def find(session: AsyncSession, owner: str, conversation_id: str) -> ConversationRow:
    """The owner's conversation within a session. Raises ConversationNotFound."""
    row = await session.get(ConversationRow, conversation_id)
    if row is None or row.owner != owner:
        raise ConversationNotFound(f"no conversation {conversation_id!r}")
    return row


def touch(row: ConversationRow) -> None:
    """Mark the conversation as changed by a message."""
    row.update_time = utc_now()
    row.generation += 1


def _check_etag(row: ConversationRow, etag: str) -> None:
    if etag and etag != str(row.generation):
        raise StaleEtag(f"etag: {etag[:40]!r} is not that of the stored conversation; read it again")


def _check_references(settings: ConversationSettings) -> None:
    """Whether model and adapter could name something; whether they do is found out at each turn."""
    if settings.model.startswith("models/"):
        ModelName.parse(settings.model, "conversation.model")
    elif settings.model:
        check_id(settings.model, "conversation.model")
    if settings.adapter:
        parse_adapter_reference(settings.adapter, "conversation.adapter")


def _bounded(name: str, value: str, limit: int) -> None:
    if "\0" in value:
        raise InvalidField.of(f"conversation.{name}", "holds a NUL character")
    if len(value.encode()) > limit:
        raise InvalidField.of(f"conversation.{name}", f"has {len(value.encode())} bytes; at most {limit}")


def _columns(settings: ConversationSettings) -> dict[str, str]:
    return {
        "title": settings.title,
        "model": settings.model,
        "adapter": settings.adapter,
        "system_message": settings.system_message,
        "labels_json": json.dumps(dict(settings.labels)),
    }


def _settings(row: ConversationRow) -> ConversationSettings:
    return ConversationSettings(
        title=row.title,
        model=row.model,
        adapter=row.adapter,
        system_message=row.system_message,
        labels=json.loads(row.labels_json),
    )


def _conversation(row: ConversationRow) -> Conversation:
    return Conversation(
        id=row.id,
        owner=row.owner,
        settings=_settings(row),
        num_messages=row.num_messages,
        create_time=row.create_time,
        update_time=row.update_time,
        etag=str(row.generation),
    )
