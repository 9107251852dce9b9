"""The training service's tables.

What is only ever read whole (specifications, progress, results, row errors) is JSON in one column; where a column's
text is empty there is none yet.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy import BigInteger, Boolean, ForeignKey, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from slipstream_server.storage.columns import Owned, UtcTime, new_metadata, utc_now
from slipstream_server.storage.event_log import EventLog
from slipstream_server.storage.migrations import Schema
from slipstream_server.storage.request_records import RequestRecords


class Rows(DeclarativeBase):
    """Base of the training tables."""

    metadata = new_metadata()


class DatasetRow(Owned, Rows):
    """A dataset. ``artifact`` is the digest of its files in the store, ``report_json`` what reading them found."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    display_name: Mapped[str] = mapped_column(Text, default="")
    labels_json: Mapped[str] = mapped_column(Text, default="{}")
    state: Mapped[str] = mapped_column(String(16), index=True)
    error_reason: Mapped[str] = mapped_column(String(64), default="")
    error_message: Mapped[str] = mapped_column(Text, default="")
    artifact: Mapped[str] = mapped_column(String(64), index=True)
    files_json: Mapped[str] = mapped_column(Text)
    wanted_format: Mapped[str] = mapped_column(String(32), default="")
    report_json: Mapped[str] = mapped_column(Text, default="")
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(Text, default="")
    generation: Mapped[int] = mapped_column(BigInteger, default=1)


class JobRow(Owned, Rows):
    """A job. ``wish`` is what somebody ordered while it had processes; ``plan_json`` what its validation found out."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    display_name: Mapped[str] = mapped_column(Text, default="")
    labels_json: Mapped[str] = mapped_column(Text, default="{}")
    dataset: Mapped[str] = mapped_column(String(63), index=True)
    spec_json: Mapped[str] = mapped_column(Text)
    plan_json: Mapped[str] = mapped_column(Text, default="")
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_message: Mapped[str] = mapped_column(Text, default="")
    error_json: Mapped[str] = mapped_column(Text, default="")
    wish: Mapped[str] = mapped_column(String(16), default="")
    wish_grace_s: Mapped[int] = mapped_column(Integer, default=10)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    num_retries: Mapped[int] = mapped_column(Integer, default=0)
    progress_json: Mapped[str] = mapped_column(Text, default="")
    outcome_json: Mapped[str] = mapped_column(Text, default="")
    last_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    start_time: Mapped[datetime | None] = mapped_column(UtcTime)
    end_time: Mapped[datetime | None] = mapped_column(UtcTime)
    generation: Mapped[int] = mapped_column(BigInteger, default=1)


class AttemptRow(Rows):
    """One start of a job's processes.

    ``mark`` stands in the environment of each of them and is stored before the first one starts; ``pid`` and
    ``process_start`` afterwards. ``spool_offset`` is how far their events have been taken.
    """

    __tablename__ = "attempts"

    job: Mapped[str] = mapped_column(String(63), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    mark: Mapped[str] = mapped_column(String(32))
    pid: Mapped[int | None] = mapped_column(BigInteger)
    process_start: Mapped[str] = mapped_column(String(64), default="")
    spool_offset: Mapped[int] = mapped_column(BigInteger, default=0)
    resumed_step: Mapped[int] = mapped_column(BigInteger, default=0)
    notes_json: Mapped[str] = mapped_column(Text, default="")
    ending_json: Mapped[str] = mapped_column(Text, default="")
    create_time: Mapped[datetime] = mapped_column(UtcTime, default=utc_now)
    end_time: Mapped[datetime | None] = mapped_column(UtcTime)


class CheckpointRow(Rows):
    """A complete checkpoint in the job's folder."""

    __tablename__ = "checkpoints"

    job: Mapped[str] = mapped_column(String(63), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    epoch: Mapped[float] = mapped_column(default=0.0)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    metrics_json: Mapped[str] = mapped_column(Text, default="{}")
    create_time: Mapped[datetime] = mapped_column(UtcTime)


class SupervisorRow(Rows):
    """Who supervises: each service that begins to takes the next number, and a smaller one may not write any more."""

    __tablename__ = "supervisors"

    one: Mapped[bool] = mapped_column(Boolean, primary_key=True, default=True)
    token: Mapped[int] = mapped_column(BigInteger)


REQUESTS = RequestRecords(Rows.metadata)
EVENTS = EventLog(Rows.metadata, "job_events")
SCHEMA = Schema(service="training", metadata=Rows.metadata, versions=Path(__file__).parent / "migrations")
