"""Versions: registered from what the intake received, read, downloaded, retired. Event loop.

A version is never changed but for its state. The same bytes again under the same adapter are the same version: the one
that exists is returned, with the provenance and figures it was first registered with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.adapters import AdapterSettings, check_etag, find_adapter, make_adapter
from slipstream_server.adapters.gate import MAX_METRIC_NAME_CHARS
from slipstream_server.adapters.intake import Received
from slipstream_server.adapters.journal import Journal
from slipstream_server.adapters.references import Reference, find_version, resolve
from slipstream_server.adapters.resources import (
    LoraSummary,
    Version,
    VersionFile,
    adapter_of,
    version_of,
    versions_of,
)
from slipstream_server.adapters.tables import (
    REQUESTS,
    SERVABLE,
    ActiveRow,
    AdapterRow,
    AliasRow,
    VersionRow,
    VersionState,
)
from slipstream_server.errors import (
    AdapterVersionNotFound,
    IncompatibleAdapter,
    InvalidField,
    WrongState,
)
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.pages import Page, PageRequest, read_page
from slipstream_server.storage.request_records import Remembered, RequestKey

MAX_METRICS = 256
MAX_PROVENANCE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionDetails:
    """What the bringer says of a version. ``provenance`` is JSON of the layer above."""

    provenance: str = "{}"
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.provenance.encode()) > MAX_PROVENANCE_BYTES:
            raise InvalidField.of("header.provenance", f"is over {MAX_PROVENANCE_BYTES} bytes")
        if len(self.metrics) > MAX_METRICS:
            raise InvalidField.of("header.metrics", f"has {len(self.metrics)} figures; at most {MAX_METRICS}")
        for name, value in self.metrics.items():
            if not 1 <= len(name) <= MAX_METRIC_NAME_CHARS or not name.isprintable():
                raise InvalidField.of("header.metrics", f"names have 1 to {MAX_METRIC_NAME_CHARS} printable characters")
            if not math.isfinite(value):
                raise InvalidField.of("header.metrics", f"{name!r} is {value}, which is not finite")


class Versions:
    """The versions of one database."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal

    async def get(self, reference: Reference) -> Version:
        """Raises as ``references.resolve``."""
        async with self._database.read() as session:
            return await version_of(session, await resolve(session, reference))

    async def by_digest(self, digest: str) -> Version:
        """A version that can be served and has the digest. Raises AdapterVersionNotFound."""
        query = select(VersionRow).where(VersionRow.digest == digest, VersionRow.state.in_(SERVABLE))
        async with self._database.read() as session:
            row = (await session.scalars(query.order_by(VersionRow.adapter, VersionRow.number).limit(1))).first()
            if row is None:
                raise AdapterVersionNotFound(f"no version has the digest sha256:{digest}")
            return await version_of(session, row)

    async def list(
        self, adapter: str, states: Collection[VersionState], page_size: int, page_token: str
    ) -> Page[Version]:
        """Versions in one of ``states``, newest first. Raises AdapterNotFound."""
        query = ("versions", adapter, *sorted(states))
        page = PageRequest(query=query, page_size=page_size, page_token=page_token)
        rows = select(VersionRow).where(VersionRow.adapter == adapter, VersionRow.state.in_(states))
        async with self._database.read() as session:
            await find_adapter(session, adapter)
            found = await read_page(session, rows, (VersionRow.number,), page, descending=True)
            return Page(await versions_of(session, found.items), found.next_page_token)

    async def repeated(self, key: RequestKey) -> Version | None:
        """The version that was made for ``key``, None for a new request.

        Raises RequestIdReused, AdapterNotFound, AdapterVersionNotFound.
        """
        async with self._database.read() as session:
            return await _made_for(session, await REQUESTS.get(session, key))

    async def expected_base(self, adapter: str, *, may_be_missing: bool) -> str:
        """The base that versions of ``adapter`` are for, empty where that is open. Raises AdapterNotFound."""
        async with self._database.read() as session:
            if may_be_missing:
                row = await session.get(AdapterRow, adapter)
                return "" if row is None or row.deleted else row.base_model
            return (await find_adapter(session, adapter)).base_model

    async def register(
        self,
        owner: str,
        adapter: str,
        received: Received,
        details: VersionDetails,
        *,
        create_missing: bool = False,
        is_verified: bool = False,
        key: RequestKey | None = None,
    ) -> Version:
        """The next version of ``adapter``; an existing one with the same digest, or that of a repeated ``key``.

        Raises AdapterNotFound, IncompatibleAdapter where the adapter is for another base by now, RequestIdReused.
        """
        async with self._database.write() as session:
            # Claimed only together with the version: an upload that dies must not block its repeat.
            known = None if key is None else await REQUESTS.get_or_claim(session, key)
            if (made := await _made_for(session, known)) is not None:
                return made
            parent = await self._parent(session, owner, adapter, received, create_missing)
            row = await _same_bytes(session, parent, received.artifact.digest)
            if row is None:
                row = await _add(session, owner, parent, received, details, is_verified)
                version = await version_of(session, row)
                await self._journal.write(session, version)
            if key is not None:
                await REQUESTS.answer(session, key, f"{row.adapter}/{row.number}".encode())
            return await version_of(session, row)

    async def retire(self, adapter: str, number: int, etag: str) -> None:
        """Retire a version; its files go when nothing refers to them. Does nothing to one that is retired already.

        Raises AdapterNotFound, AdapterVersionNotFound, StaleEtag, WrongState.
        """
        async with self._database.write() as session:
            row = await find_version(session, adapter, number)
            check_etag(row.generation, etag)
            if row.state == VersionState.RETIRED:
                return
            await _refuse_in_use(session, row)
            row.state, row.generation = VersionState.RETIRED, row.generation + 1
            (await find_adapter(session, adapter)).update_time = utc_now()
            await session.flush()
            await self._journal.write(session, await version_of(session, row))

    async def _parent(
        self, session: AsyncSession, owner: str, adapter: str, received: Received, create_missing: bool
    ) -> AdapterRow:
        """The adapter that gets the version, made or given its base where that is due."""
        base = received.facts.configuration.base_model
        row = await session.get(AdapterRow, adapter)
        if (row is None or row.deleted) and create_missing:
            row = await make_adapter(session, owner, adapter, AdapterSettings(base_model=base))
            await self._journal.write(session, await adapter_of(session, row))
            return row
        row = await find_adapter(session, adapter)
        if row.base_model not in ("", base):
            raise IncompatibleAdapter(f"versions of {adapter!r} are for the base {row.base_model!a}, not {base!a}")
        row.update_time = utc_now()
        if not row.base_model:
            row.base_model, row.generation = base, row.generation + 1
            await session.flush()
            await self._journal.write(session, await adapter_of(session, row))
        return row


async def _made_for(session: AsyncSession, known: Remembered | None) -> Version | None:
    """The version that a request made which came before."""
    if known is None or known.response is None:
        return None
    adapter, _, number = known.response.decode().partition("/")
    return await version_of(session, await find_version(session, adapter, int(number)))


async def _same_bytes(session: AsyncSession, parent: AdapterRow, digest: str) -> VersionRow | None:
    query = select(VersionRow).where(VersionRow.adapter == parent.id, VersionRow.digest == digest)
    return (await session.scalars(query.where(VersionRow.state.in_(SERVABLE)).limit(1))).first()


async def _add(
    session: AsyncSession,
    owner: str,
    parent: AdapterRow,
    received: Received,
    details: VersionDetails,
    is_verified: bool,
) -> VersionRow:
    parent.last_number += 1
    manifest, configuration = received.artifact.manifest, received.facts.configuration
    summary = LoraSummary.of(received.facts)
    files = [
        VersionFile(path=path, size_bytes=entry.size_bytes, sha256=entry.sha256)
        for path, entry in sorted(manifest.files.items())
    ]
    row = VersionRow(
        adapter=parent.id,
        number=parent.last_number,
        owner=owner,
        state=VersionState.VERIFIED if is_verified else VersionState.REGISTERED,
        state_message=f"rank {received.facts.largest_rank}, {summary.num_parameters} parameters in {summary.dtype}",
        digest=received.artifact.digest,
        size_bytes=manifest.total_bytes,
        files_json=json.dumps([asdict(file) for file in files]),
        facts_json=summary.to_json(),
        base_model=configuration.base_model,
        base_model_revision=configuration.base_model_revision,
        provenance_json=details.provenance,
        metrics_json=json.dumps(dict(details.metrics), sort_keys=True),
    )
    session.add(row)
    await session.flush()
    return row


async def _refuse_in_use(session: AsyncSession, row: VersionRow) -> None:
    """Raises WrongState where an alias or a model's default points at the version."""
    aliases = select(AliasRow.alias).where(AliasRow.adapter == row.adapter, AliasRow.number == row.number)
    models = select(ActiveRow.model).where(ActiveRow.adapter_id == row.adapter, ActiveRow.number == row.number)
    for what, query in (("alias", aliases), ("model", models)):
        if (user := (await session.scalars(query.limit(1))).first()) is not None:
            raise WrongState(
                f"{row.adapter}@v{row.number} is in use by the {what} {user!r}; point that elsewhere first",
                metadata={"state": row.state, what: user},
            )
