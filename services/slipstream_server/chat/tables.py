"""The chat service's tables.

A message's text stands in a column; what more it has (parts, tool calls) is opaque bytes of the layer above.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from sqlalchemy import BigInteger, ForeignKey, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from slipstream_server.storage.columns import Owned, new_metadata
from slipstream_server.storage.migrations import Schema
from slipstream_server.storage.request_records import RequestRecords


class MessageState(StrEnum):
    """How far a message got."""

    COMPLETE = "complete"
    GENERATING = "generating"
    INCOMPLETE = "incomplete"


class Rows(DeclarativeBase):
    """Base of the chat tables."""

    metadata = new_metadata()


class ConversationRow(Owned, Rows):
    """A conversation. ``last_sequence`` is its newest message's; ``generation`` counts changes and is its etag."""

    __tablename__ = "conversations"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    adapter: Mapped[str] = mapped_column(Text)
    system_message: Mapped[str] = mapped_column(Text)
    labels_json: Mapped[str] = mapped_column(Text)
    num_messages: Mapped[int] = mapped_column(BigInteger, default=0)
    last_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    generation: Mapped[int] = mapped_column(BigInteger, default=1)


class MessageRow(Owned, Rows):
    """A message. A reply follows its question: the question's sequence is one less."""

    __tablename__ = "messages"

    conversation: Mapped[str] = mapped_column(
        String(63), ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True
    )
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16), index=True)
    role: Mapped[str] = mapped_column(String(16))
    content: Mapped[str] = mapped_column(Text)
    extra: Mapped[bytes] = mapped_column(LargeBinary)
    finish_reason: Mapped[str] = mapped_column(String(32), default="")
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    cached_prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    model: Mapped[str] = mapped_column(Text, default="")
    adapter_version: Mapped[str] = mapped_column(Text, default="")
    writer: Mapped[str] = mapped_column(String(32), default="")


REQUESTS = RequestRecords(Rows.metadata)
SCHEMA = Schema(service="chat", metadata=Rows.metadata, versions=Path(__file__).parent / "migrations")
