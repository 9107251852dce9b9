"""Column types and mixins that every service's tables share.

Declarations only: no engine, no session, no I/O.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import BigInteger, MetaData, String
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

DEFAULT_OWNER = "anonymous"
"""Who owns what is made while the service knows no identities."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# Constraints have names, so that later revisions can alter them on both databases.
_CONSTRAINT_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def new_metadata() -> MetaData:
    """The MetaData of one service's tables."""
    return MetaData(naming_convention=_CONSTRAINT_NAMES)


def utc_now() -> datetime:
    return datetime.now(UTC)


class UtcTime(TypeDecorator[datetime]):
    """A moment, kept as whole microseconds since 1970 UTC: exact, and ordered alike on SQLite and PostgreSQL."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a stored time needs a time zone")
        return (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + value * _MICROSECOND


class Owned:
    """Mixin of every stored resource: whose it is, when it was made and last changed."""

    owner: Mapped[str] = mapped_column(String(255), default=DEFAULT_OWNER, index=True)
    create_time: Mapped[datetime] = mapped_column(UtcTime, default=utc_now)
    update_time: Mapped[datetime] = mapped_column(UtcTime, default=utc_now, onupdate=utc_now)
