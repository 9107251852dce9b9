"""The models that the service knows, as they are stored: what is wanted, where it comes from, who registered it.

Every change is one transaction and is seen in ``by_name`` once it is on disk. Knows neither workers nor memory. Lives
on the service's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.errors import ModelNotFound, ResourceExists, SlipstreamError, StaleEtag
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.tables import REQUESTS, ModelRow
from slipstream_server.storage.columns import DEFAULT_OWNER, utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.request_records import RequestKey


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """What is known of a model when it is registered; see ``tables.ModelRow``."""

    id: str
    source: str
    locator: str
    revision: str = ""
    by_operator: bool = False
    at_start: bool = False
    pinned: bool = False
    wanted: bool = False
    creating: bool = False
    folder: str = ""
    owns_folder: bool = False
    training_job: str = ""
    base_model: str = ""
    licence: str = ""
    options: LoadChoice | None = None
    owner: str = DEFAULT_OWNER


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel(NewModel):
    """A registered model."""

    resolved_source: str
    resolved_revision: str
    error_reason: str
    error_message: str
    load_time: datetime | None
    create_time: datetime
    update_time: datetime
    etag: str

    @property
    def known_folder(self) -> Path | None:
        """Where its prepared files were found last."""
        return Path(self.folder) if self.folder else None


class ModelRecords:
    """The models of one database.

    ``by_name`` has all of them as this process knows them; ``on_change`` hears of each that was added or changed.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.by_name: dict[str, StoredModel] = {}
        self.on_change: Callable[[str], None] = lambda name: None

    async def read(self) -> None:
        """Fill ``by_name``."""
        async with self._database.read() as session:
            rows = (await session.scalars(select(ModelRow).order_by(ModelRow.id))).all()
        self.by_name = {row.id: _stored(row) for row in rows}

    def get(self, name: str) -> StoredModel:
        """Raises ModelNotFound."""
        record = self.by_name.get(name)
        if record is None:
            raise ModelNotFound.named(name, self.by_name)
        return record

    async def answered(self, key: RequestKey) -> str | None:
        """The model that the request made or changed when it came before; RequestIdReused where it was another one."""
        async with self._database.read() as session:
            known = await REQUESTS.get(session, key)
        return None if known is None else (known.response or b"").decode()

    async def purge(self) -> None:
        """Drop the memory of requests that has expired."""
        async with self._database.write() as session:
            await REQUESTS.purge(session)

    async def add(self, new: NewModel, *, key: RequestKey | None = None) -> StoredModel:
        """Register a model. Raises ResourceExists, RequestIdReused."""
        async with self._database.write() as session:
            if await session.get(ModelRow, new.id) is not None:
                raise ResourceExists(f"name: a model {new.id!r} exists; choose another id")
            row = ModelRow(**_columns({item.name: getattr(new, item.name) for item in fields(NewModel)}))
            session.add(row)
            await _remember(session, key, new.id)
            await session.flush()
            record = _stored(row)
        self._keep(record)
        return record

    async def change(
        self, name: str, *, etag: str = "", key: RequestKey | None = None, counts: bool = True, **changes: Any
    ) -> StoredModel:
        """Set columns by their names in StoredModel; with ``counts`` the etag changes. ModelNotFound, StaleEtag."""
        async with self._database.write() as session:
            row = await _find(session, name)
            _check_etag(row, etag)
            for column, value in _columns(changes).items():
                setattr(row, column, value)
            row.generation += counts
            row.update_time = utc_now()
            await _remember(session, key, name)
            await session.flush()
            record = _stored(row)
        self._keep(record)
        return record

    def _keep(self, record: StoredModel) -> None:
        self.by_name[record.id] = record
        self.on_change(record.id)

    async def fail(self, name: str, error: SlipstreamError) -> StoredModel:
        """Keep why the last attempt failed."""
        return await self.change(name, counts=False, error_reason=error.reason, error_message=error.message)

    async def remove(self, name: str, *, etag: str = "") -> StoredModel:
        """Forget a model; what it was. Raises ModelNotFound, StaleEtag."""
        async with self._database.write() as session:
            row = await _find(session, name)
            _check_etag(row, etag)
            record = _stored(row)
            await session.execute(delete(ModelRow).where(ModelRow.id == name))
        self.by_name.pop(name, None)
        return record


async def _find(session: AsyncSession, name: str) -> ModelRow:
    row = await session.get(ModelRow, name)
    if row is None:
        raise ModelNotFound.named(name)
    return row


async def _remember(session: AsyncSession, key: RequestKey | None, name: str) -> None:
    if key is not None:
        await REQUESTS.get_or_claim(session, key)
        await REQUESTS.answer(session, key, name.encode())


def _check_etag(row: ModelRow, etag: str) -> None:
    if etag and etag != str(row.generation):
        raise StaleEtag(f"etag: {etag[:40]!a} is not that of the stored model; read it again")


def _columns(values: Mapping[str, Any]) -> dict[str, Any]:
    columns = dict(values)
    if "options" in columns:
        options: LoadChoice | None = columns.pop("options")
        columns["options_json"] = "" if options is None else options.encoded()
    return columns


def _stored(row: ModelRow) -> StoredModel:
    names = {item.name for item in fields(StoredModel)} - {"options", "etag"}
    return StoredModel(
        options=LoadChoice.decoded(row.options_json) if row.options_json else None,
        etag=str(row.generation),
        **{name: getattr(row, name) for name in names},
    )
