"""Pages of a list, and the opaque tokens that lead from one to the next.

A token holds the sort key of the last row shown, so rows that are added or removed between two calls shift nothing. It
is bound to its query (method, parent, filter, owner, order): another query's token, or one that was altered, is an
InvalidField.

Knows no table. ``read_page`` runs in the caller's read session.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from slipstream_server.errors import InvalidField

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

_MAX_TOKEN_CHARS = 4096
_CHECK_BYTES = 16
# Guards against mistakes and tinkering, not against an attacker: who may see a row is decided by the query, never by
# the token.
_KEY = b"slipstream page token 1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """What a client asked for; ``query`` is every part of it that decides which rows there are, in which order."""

    query: tuple[str, ...]
    page_size: int = 0
    page_token: str = ""
    max_page_size: int = MAX_PAGE_SIZE

    def num_rows(self) -> int:
        """``page_size``, with 0 as the default. Raises InvalidField outside 0 to ``max_page_size``."""
        if not 0 <= self.page_size <= self.max_page_size:
            allowed = f"0 (the default of {DEFAULT_PAGE_SIZE}) to {self.max_page_size}"
            raise InvalidField.of("page_size", f"{self.page_size} is not from {allowed}")
        return self.page_size or DEFAULT_PAGE_SIZE

    def position(self) -> tuple[Any, ...] | None:
        """The sort key to go on after, None at the start. Raises InvalidField for a token that is not this query's."""
        return decode_token(self.query, self.page_token) if self.page_token else None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows and the token of the page after them, empty on the last one."""

    items: tuple[T, ...]
    next_page_token: str


async def read_page(
    session: AsyncSession,
    rows: Select[T],
    key: Sequence[InstrumentedAttribute[Any]],
    page: PageRequest,
    *,
    descending: bool = False,
) -> Page[T]:
    """One page of ``rows`` by ``key``: columns of text, whole numbers or times, unique together, never NULL."""
    num_rows, position = page.num_rows(), page.position()
    if position is not None:
        at, after = tuple_(*key), tuple_(*position, types=[column.type for column in key])
        rows = rows.where(at < after if descending else at > after)
    order = [column.desc() if descending else column.asc() for column in key]
    found = (await session.scalars(rows.order_by(*order).limit(num_rows + 1))).all()
    items = tuple(found[:num_rows])
    if len(found) <= num_rows:
        return Page(items, "")
    last = tuple(getattr(items[-1], column.key) for column in key)
    return Page(items, encode_token(page.query, last))


def encode_token(query: tuple[str, ...], position: tuple[Any, ...]) -> str:
    """The token of the page of ``query`` that begins after ``position``."""
    payload = json.dumps([_to_json(part) for part in position], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_check(query, payload) + payload).decode().rstrip("=")


def decode_token(query: tuple[str, ...], token: str) -> tuple[Any, ...]:
    """The position in ``token``. Raises InvalidField unless it was made for ``query``."""
    raw = b""
    if len(token) <= _MAX_TOKEN_CHARS and token.isascii():
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except binascii.Error:
            pass
    payload = raw[_CHECK_BYTES:]
    if not hmac.compare_digest(raw[:_CHECK_BYTES], _check(query, payload)):
        raise InvalidField.of(
            "page_token", "not the next_page_token of a page of this same list; leave it empty to begin anew"
        )
    return tuple(_from_json(part) for part in json.loads(payload))


def _check(query: tuple[str, ...], payload: bytes) -> bytes:
    bound = json.dumps(query).encode() + b"\0" + payload
    return hmac.digest(_KEY, bound, hashlib.sha256)[:_CHECK_BYTES]


def _to_json(part: str | int | datetime) -> str | int | dict[str, str]:
    return {"time": part.astimezone(UTC).isoformat()} if isinstance(part, datetime) else part


def _from_json(part: str | int | dict[str, str]) -> str | int | datetime:
    return datetime.fromisoformat(part["time"]) if isinstance(part, dict) else part
