"""Idempotency: the answer to a ``request_id`` is kept for 24 hours; a repeat gets it instead of doing the work twice.

Every call but ``get`` runs inside the caller's write transaction, the one that makes the resource, so that the resource
and the memory of it appear together. Knows no message type: requests and answers are bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Column, ColumnElement, LargeBinary, MetaData, String, Table, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.errors import InvalidField, RequestIdReused
from slipstream_server.storage.columns import UtcTime, utc_now

KEPT = timedelta(hours=24)
MAX_REQUEST_ID_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """Which request: whose, of which method, with which id, and the hash of what it asked."""

    owner: str
    method: str
    request_id: str
    request_sha256: str

    @classmethod
    def of(cls, *, owner: str, method: str, request_id: str, request: bytes) -> RequestKey:
        """The key of a ``request``, serialized so that equal ones have equal bytes. Raises InvalidField on a bad id."""
        if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS or not request_id.isprintable():
            shown = ascii(request_id[:MAX_REQUEST_ID_CHARS])
            raise InvalidField.of("request_id", f"{shown} is not 1 to {MAX_REQUEST_ID_CHARS} printable characters")
        sha256 = hashlib.sha256(request).hexdigest()
        return cls(owner=owner, method=method, request_id=request_id, request_sha256=sha256)


@dataclass(frozen=True, slots=True)
class Remembered:
    """A request that came before. ``response`` is None while its work is not done."""

    response: bytes | None


class RequestRecords:
    """The table ``request_records`` of one service."""

    def __init__(self, metadata: MetaData) -> None:
        self.table = Table("request_records", metadata, *request_record_columns())

    async def get(self, session: AsyncSession, key: RequestKey) -> Remembered | None:
        """What is known of ``key``, if anything. Only reads.

        Raises RequestIdReused where the same id came with a different request.
        """
        c = self.table.c
        found = select(c.request_sha256, c.response).where(*self._is(key), c.expire_time > utc_now())
        row = (await session.execute(found)).one_or_none()
        return None if row is None else _same_request(key, row.request_sha256, row.response)

    async def get_or_claim(self, session: AsyncSession, key: RequestKey) -> Remembered | None:
        """What is known of ``key``; where nothing is, None, and the key is claimed: do the work, then ``answer``.

        Raises as ``get``.
        """
        known = await self.get(session, key)
        if known is not None:
            return known
        now = utc_now()
        await self.forget(session, key)
        await session.execute(
            insert(self.table).values(
                owner=key.owner,
                method=key.method,
                request_id=key.request_id,
                request_sha256=key.request_sha256,
                create_time=now,
                expire_time=now + KEPT,
            )
        )
        return None

    async def answer(self, session: AsyncSession, key: RequestKey, response: bytes) -> None:
        """Keep the answer of a claimed ``key``."""
        await session.execute(update(self.table).where(*self._is(key)).values(response=response))

    async def forget(self, session: AsyncSession, key: RequestKey) -> None:
        """Give a claim up: the work failed, and a repeat may try again."""
        await session.execute(delete(self.table).where(*self._is(key)))

    async def purge(self, session: AsyncSession, now: datetime | None = None) -> None:
        """Drop what has expired."""
        await session.execute(delete(self.table).where(self.table.c.expire_time <= (now or utc_now())))

    def _is(self, key: RequestKey) -> tuple[ColumnElement[bool], ...]:
        c = self.table.c
        return (c.owner == key.owner, c.method == key.method, c.request_id == key.request_id)


def request_record_columns() -> list[Column[object]]:
    return [
        Column("owner", String(255), primary_key=True),
        Column("method", String(128), primary_key=True),
        Column("request_id", String(MAX_REQUEST_ID_CHARS), primary_key=True),
        Column("request_sha256", String(64), nullable=False),
        Column("response", LargeBinary, nullable=True),
        Column("create_time", UtcTime, nullable=False),
        Column("expire_time", UtcTime, nullable=False, index=True),
    ]


def _same_request(key: RequestKey, known_sha256: str, response: bytes | None) -> Remembered:
    if known_sha256 != key.request_sha256:
        raise RequestIdReused(
            f"request_id: {key.request_id!a} was used within 24 hours for a different {key.method} request",
            metadata={"request_id": key.request_id},
        )
    return Remembered(response)
