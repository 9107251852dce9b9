"""Adapters: made, read, changed and deleted, each in one transaction. Event loop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.journal import AdapterDeleted, Entry, Journal
from slipstream_server.adapters.resources import Adapter, active_of, adapter_of, adapters_of
from slipstream_server.adapters.tables import (
    REQUESTS,
    ActiveRow,
    AdapterRow,
    AliasRow,
    PositionRow,
    VersionRow,
)
from slipstream_server.errors import AdapterNotFound, InvalidField, ResourceExists, StaleEtag, WrongState
from slipstream_server.resource_names import AdapterName
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.pages import Page, PageRequest, read_page
from slipstream_server.storage.request_records import RequestKey

MAX_DISPLAY_NAME_CHARS = 200
MAX_DESCRIPTION_CHARS = 4096
MAX_BASE_MODEL_CHARS = 512
MAX_LABELS = 64
CHANGEABLE = ("display_name", "description", "labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What its maker chooses."""

    display_name: str = ""
    description: str = ""
    base_model: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("adapter.display_name", self.display_name, MAX_DISPLAY_NAME_CHARS)
        check_text("adapter.description", self.description, MAX_DESCRIPTION_CHARS)
        check_text("adapter.base_model", self.base_model, MAX_BASE_MODEL_CHARS)
        if len(self.labels) > MAX_LABELS:
            raise InvalidField.of("adapter.labels", f"has {len(self.labels)} entries; at most {MAX_LABELS}")
        for key, value in self.labels.items():
            if not 1 <= len(key) <= 63 or len(value) > 255 or "\0" in key + value:
                raise InvalidField.of(
                    "adapter.labels", "keys have 1 to 63, values at most 255 characters, none of them NUL"
                )

    def columns(self) -> dict[str, str]:
        return {
            "display_name": self.display_name,
            "description": self.description,
            "base_model": self.base_model,
            "labels_json": json.dumps(dict(self.labels), sort_keys=True),
        }


class Adapters:
    """The adapters of one database."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal

    async def create(
        self, owner: str, adapter_id: str, settings: AdapterSettings, *, key: RequestKey | None = None
    ) -> Adapter:
        """A new adapter without versions; for a repeated ``key`` the one that was made for it.

        Raises ResourceExists, RequestIdReused, AdapterNotFound (repeated, but deleted since).
        """
        async with self._database.write() as session:
            if key is not None and await REQUESTS.get_or_claim(session, key) is not None:
                return await adapter_of(session, await find_adapter(session, adapter_id))
            row = await make_adapter(session, owner, adapter_id, settings)
            if key is not None:
                await REQUESTS.answer(session, key, adapter_id.encode())
            adapter = await adapter_of(session, row)
            await self._journal.write(session, adapter)
            return adapter

    async def check_creation(self, adapter_id: str) -> None:
        """Raises ResourceExists as ``create`` would."""
        async with self._database.read() as session:
            _refuse_existing(await session.get(AdapterRow, adapter_id))

    async def get(self, adapter_id: str) -> Adapter:
        """Raises AdapterNotFound."""
        async with self._database.read() as session:
            return await adapter_of(session, await find_adapter(session, adapter_id))

    async def list(self, base_model: str, page_size: int, page_token: str) -> Page[Adapter]:
        """Adapters by their ids, of one base or of all."""
        page = PageRequest(query=("adapters", base_model), page_size=page_size, page_token=page_token)
        rows = select(AdapterRow).where(AdapterRow.deleted.is_(False))
        if base_model:
            rows = rows.where(AdapterRow.base_model == base_model)
        async with self._database.read() as session:
            found = await read_page(session, rows, (AdapterRow.id,), page)
            return Page(await adapters_of(session, found.items), found.next_page_token)

    async def update(self, adapter_id: str, changes: Mapping[str, Any], etag: str) -> Adapter:
        """Set the fields in ``changes`` (names of CHANGEABLE). Raises AdapterNotFound, StaleEtag, InvalidField."""
        async with self._database.write() as session:
            row = await find_adapter(session, adapter_id)
            check_etag(row.generation, etag)
            values = {"labels": json.loads(row.labels_json), "display_name": row.display_name}
            values |= {"description": row.description, "base_model": row.base_model, **changes}
            set_columns(row, AdapterSettings(**values).columns())
            row.generation += 1
            await session.flush()
            adapter = await adapter_of(session, row)
            await self._journal.write(session, adapter)
            return adapter

    async def delete(self, adapter_id: str, etag: str, *, force: bool) -> Entry:
        """Delete the adapter, with ``force`` its versions and aliases too; models lose it as their default.

        Raises AdapterNotFound, StaleEtag, WrongState.
        """
        async with self._database.write() as session:
            row = await find_adapter(session, adapter_id)
            check_etag(row.generation, etag)
            if not force and (num_versions := (await adapter_of(session, row)).num_versions):
                raise WrongState(
                    f"adapter {adapter_id!r} has {num_versions} versions; delete them first, or set force",
                    metadata={"version_count": str(num_versions)},
                )
            await self._deactivate(session, adapter_id)
            await _leave_tombstones(session, row)
            return await self._journal.write(session, AdapterDeleted(str(AdapterName(adapter_id))))

    async def _deactivate(self, session: AsyncSession, adapter_id: str) -> None:
        for active in (await session.scalars(select(ActiveRow).where(ActiveRow.adapter_id == adapter_id))).all():
            set_columns(active, {"adapter": "", "adapter_id": "", "number": None, "enabled": False})
            active.generation += 1
            await session.flush()
            await self._journal.write(session, active_of(active))


async def find_adapter(session: AsyncSession, adapter_id: str) -> AdapterRow:
    """The adapter within a session. Raises AdapterNotFound."""
    row = await session.get(AdapterRow, adapter_id)
    if row is None or row.deleted:
        raise AdapterNotFound(f"no adapter {adapter_id!r}")
    return row


async def make_adapter(session: AsyncSession, owner: str, adapter_id: str, settings: AdapterSettings) -> AdapterRow:
    """A new row, or the tombstone of a deleted adapter back to life, whose numbers go on. Raises ResourceExists."""
    row = await session.get(AdapterRow, adapter_id)
    _refuse_existing(row)
    if row is None:
        row = AdapterRow(id=adapter_id, owner=owner, **settings.columns())
        session.add(row)
    else:
        set_columns(row, {**settings.columns(), "owner": owner, "deleted": False, "create_time": utc_now()})
        row.generation += 1
    await session.flush()
    return row


def check_etag(generation: int, etag: str) -> None:
    """Raises StaleEtag unless ``etag`` is empty or that of ``generation``."""
    if etag and etag != str(generation):
        raise StaleEtag(f"etag: {etag[:40]!a} is not that of the stored resource; read it again")


def check_text(name: str, value: str, max_chars: int) -> None:
    """Raises InvalidField for a text that is too long or holds NUL."""
    if len(value) > max_chars:
        raise InvalidField.of(name, f"has {len(value)} characters; at most {max_chars}")
    if "\0" in value:
        raise InvalidField.of(name, "holds a NUL character")


def set_columns(row: object, values: Mapping[str, Any]) -> None:
    for column, value in values.items():
        setattr(row, column, value)


def _refuse_existing(row: AdapterRow | None) -> None:
    if row is not None and not row.deleted:
        raise ResourceExists(f"adapter_id: an adapter {row.id!r} exists; choose another id")


async def _leave_tombstones(session: AsyncSession, row: AdapterRow) -> None:
    await session.execute(delete(PositionRow).where(PositionRow.adapter == row.id))
    await session.execute(delete(VersionRow).where(VersionRow.adapter == row.id))
    for alias in await session.scalars(select(AliasRow).where(AliasRow.adapter == row.id)):
        if alias.number is not None:
            alias.number, alias.generation = None, alias.generation + 1
    row.deleted = True
    row.generation += 1
