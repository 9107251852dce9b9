"""A small service's tables for the tests of storage: books on shelves, request records and an event log."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from slipstream_server.storage.columns import Owned, new_metadata
from slipstream_server.storage.event_log import EventLog
from slipstream_server.storage.migrations import Schema
from slipstream_server.storage.request_records import RequestRecords


class Rows(DeclarativeBase):
    metadata = new_metadata()


class Shelf(Owned, Rows):
    __tablename__ = "shelves"

    shelf_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    num_visits: Mapped[int] = mapped_column(BigInteger, default=0)


class Book(Owned, Rows):
    __tablename__ = "books"

    book_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    shelf_id: Mapped[str] = mapped_column(ForeignKey("shelves.shelf_id"))
    rank: Mapped[int] = mapped_column(BigInteger, default=0)


requests = RequestRecords(Rows.metadata)
events = EventLog(Rows.metadata, "shelf_events")

SCHEMA = Schema(service="shelf", metadata=Rows.metadata, versions=Path(__file__).parent / "revisions")
