"""The inference service's tables: the models it knows, and the memory of requests.

What a model is doing now is no row: it is the front's, gone with the process. A row says what is wanted.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy import BigInteger, Boolean, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from slipstream_server.storage.columns import Owned, UtcTime, new_metadata
from slipstream_server.storage.migrations import Schema
from slipstream_server.storage.request_records import RequestRecords


class Rows(DeclarativeBase):
    """Base of the inference tables."""

    metadata = new_metadata()


class ModelRow(Owned, Rows):
    """A model. ``generation`` counts changes and is its etag.

    ``source`` is what clients see, ``locator`` what ``models.sources`` resolves (perhaps a path); ``folder`` is where
    its prepared files were found last. ``by_operator``: the locator is the operator's own, so that no root bounds it;
    ``at_start``: the operator's flags name it now. ``owns_folder``: the service made the files itself.
    """

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    locator: Mapped[str] = mapped_column(Text)
    revision: Mapped[str] = mapped_column(Text, default="")
    by_operator: Mapped[bool] = mapped_column(Boolean, default=False)
    at_start: Mapped[bool] = mapped_column(Boolean, default=False)
    options_json: Mapped[str] = mapped_column(Text, default="")
    pinned: Mapped[bool] = mapped_column(Boolean, default=False)
    wanted: Mapped[bool] = mapped_column(Boolean, default=False)
    creating: Mapped[bool] = mapped_column(Boolean, default=False)
    error_reason: Mapped[str] = mapped_column(String(64), default="")
    error_message: Mapped[str] = mapped_column(Text, default="")
    folder: Mapped[str] = mapped_column(Text, default="")
    owns_folder: Mapped[bool] = mapped_column(Boolean, default=False)
    resolved_source: Mapped[str] = mapped_column(Text, default="")
    resolved_revision: Mapped[str] = mapped_column(Text, default="")
    training_job: Mapped[str] = mapped_column(Text, default="")
    base_model: Mapped[str] = mapped_column(Text, default="")
    licence: Mapped[str] = mapped_column(Text, default="")
    load_time: Mapped[datetime | None] = mapped_column(UtcTime)
    generation: Mapped[int] = mapped_column(BigInteger, default=1)


REQUESTS = RequestRecords(Rows.metadata)
SCHEMA = Schema(service="inference", metadata=Rows.metadata, versions=Path(__file__).parent / "migrations")
