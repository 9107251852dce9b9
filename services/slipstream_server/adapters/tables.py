"""The adapter service's tables.

A deleted adapter or alias leaves its row behind as a tombstone, so that version numbers and generations are never given
twice. What is only ever read whole (labels, files, facts, metrics, provenance, gates) is JSON in one column.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path

from sqlalchemy import BigInteger, Boolean, ForeignKey, ForeignKeyConstraint, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from slipstream_server.storage.columns import Owned, UtcTime, new_metadata
from slipstream_server.storage.event_log import EventLog
from slipstream_server.storage.migrations import Schema
from slipstream_server.storage.request_records import RequestRecords


class VersionState(StrEnum):
    """How far a version has come."""

    IMPORTING = "importing"
    REGISTERED = "registered"
    VERIFIED = "verified"
    FAILED = "failed"
    RETIRED = "retired"


SERVABLE = frozenset({VersionState.REGISTERED, VersionState.VERIFIED})


class Rows(DeclarativeBase):
    """Base of the adapter tables."""

    metadata = new_metadata()


class AdapterRow(Owned, Rows):
    """A name under which versions are kept. ``last_number`` is the highest version number ever given under it."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)
    display_name: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    labels_json: Mapped[str] = mapped_column(Text)
    last_number: Mapped[int] = mapped_column(BigInteger, default=0)
    generation: Mapped[int] = mapped_column(BigInteger, default=1)


class VersionRow(Owned, Rows):
    """One set of weights. ``digest`` is the artifact's, empty while there is none."""

    __tablename__ = "versions"

    adapter: Mapped[str] = mapped_column(String(63), ForeignKey("adapters.id"), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16))
    state_message: Mapped[str] = mapped_column(Text, default="")
    error_reason: Mapped[str] = mapped_column(String(64), default="")
    error_message: Mapped[str] = mapped_column(Text, default="")
    digest: Mapped[str] = mapped_column(String(64), default="", index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    files_json: Mapped[str] = mapped_column(Text, default="[]")
    facts_json: Mapped[str] = mapped_column(Text, default="")
    base_model: Mapped[str] = mapped_column(Text, default="")
    base_model_revision: Mapped[str] = mapped_column(Text, default="")
    provenance_json: Mapped[str] = mapped_column(Text, default="{}")
    metrics_json: Mapped[str] = mapped_column(Text, default="{}")
    generation: Mapped[int] = mapped_column(BigInteger, default=1)


class AliasRow(Owned, Rows):
    """A name that points at a version; ``number`` is None once the alias is deleted."""

    __tablename__ = "aliases"

    adapter: Mapped[str] = mapped_column(String(63), ForeignKey("adapters.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int | None] = mapped_column(BigInteger)
    generation: Mapped[int] = mapped_column(BigInteger)
    gate_json: Mapped[str] = mapped_column(Text, default="")


class PositionRow(Rows):
    """Where an alias pointed from one generation on; the newest is where it points now."""

    __tablename__ = "alias_positions"
    __table_args__ = (ForeignKeyConstraint(["adapter", "alias"], ["aliases.adapter", "aliases.alias"]),)

    adapter: Mapped[str] = mapped_column(String(63), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    generation: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger)
    set_time: Mapped[datetime] = mapped_column(UtcTime)
    set_by: Mapped[str] = mapped_column(String(255))
    comment: Mapped[str] = mapped_column(Text)
    gate_overridden: Mapped[bool] = mapped_column(Boolean)


class ActiveRow(Owned, Rows):
    """What a model applies where a request names no adapter. ``adapter`` is as it was set; empty: none."""

    __tablename__ = "active_adapters"

    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    adapter: Mapped[str] = mapped_column(Text)
    adapter_id: Mapped[str] = mapped_column(String(63), index=True)
    number: Mapped[int | None] = mapped_column(BigInteger)
    enabled: Mapped[bool] = mapped_column(Boolean)
    generation: Mapped[int] = mapped_column(BigInteger)


REQUESTS = RequestRecords(Rows.metadata)
EVENTS = EventLog(Rows.metadata, "registry_events")
SCHEMA = Schema(service="adapters", metadata=Rows.metadata, versions=Path(__file__).parent / "migrations")
