"""Every change of the registry, as an event in the transaction that makes it.

The payload is written by the layer above (``Encode``): the registry neither reads nor understands it. Event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.resources import ActiveAdapter, Adapter, Alias, Version
from slipstream_server.adapters.tables import EVENTS
from slipstream_server.storage.columns import utc_now

STREAM = "registry"
KEPT_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class AliasDeleted:
    name: str


@dataclass(frozen=True, slots=True)
class AdapterDeleted:
    name: str


Change = Adapter | Version | Alias | ActiveAdapter | AliasDeleted | AdapterDeleted
Encode = Callable[[Change], bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """An event as it was written: its number, and the payload of the change."""

    sequence: int
    payload: bytes

    def to_bytes(self) -> bytes:
        return self.sequence.to_bytes(8, "big") + self.payload

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        return cls(int.from_bytes(data[:8], "big"), data[8:])


class Journal:
    """Writes changes into the event log."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    async def write(self, session: AsyncSession, change: Change) -> Entry:
        payload = self._encode(change)
        (sequence,) = await EVENTS.append(session, STREAM, [payload], utc_now())
        return Entry(sequence, payload)

    async def last(self, session: AsyncSession, change: Change) -> Entry:
        """An entry for something that did not change: it was so by the last event there is."""
        return Entry((await EVENTS.bounds(session, STREAM)).last, self._encode(change))
