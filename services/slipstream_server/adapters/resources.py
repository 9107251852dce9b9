"""What callers see of the registry, made from rows: adapters, versions, aliases, and models' active adapters.

Frozen values; the functions read in the session they are given. Knows no gRPC.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.gate import AliasGate
from slipstream_server.adapters.inspection import AdapterFacts
from slipstream_server.adapters.tables import (
    ActiveRow,
    AdapterRow,
    AliasRow,
    PositionRow,
    VersionRow,
    VersionState,
)
from slipstream_server.resource_names import AdapterAliasName, AdapterVersionName

MAX_HISTORY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A name under which versions are kept. ``latest_number`` is None where there is no version."""

    id: str
    display_name: str
    description: str
    base_model: str
    labels: Mapping[str, str]
    latest_number: int | None
    num_versions: int
    owner: str
    create_time: datetime
    update_time: datetime
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFile:
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSummary:
    """The shape of an adapter as it is listed."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    bias: str
    use_rslora: bool
    use_dora: bool
    task_type: str
    dtype: str
    num_parameters: int

    @classmethod
    def of(cls, facts: AdapterFacts) -> LoraSummary:
        configuration = facts.configuration
        return cls(
            rank=configuration.rank,
            alpha=configuration.alpha,
            dropout=configuration.dropout,
            target_modules=facts.target_names,
            modules_to_save=configuration.modules_to_save,
            bias=configuration.bias,
            use_rslora=configuration.use_rslora,
            use_dora=configuration.use_dora,
            task_type=configuration.task_type,
            dtype=facts.dtype,
            num_parameters=facts.num_parameters,
        )

    def to_json(self) -> str:
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_json(cls, text: str) -> LoraSummary:
        values = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("target_modules", "modules_to_save")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One set of weights. ``digest`` is empty and ``lora`` None while there are no files.

    ``provenance`` is JSON of the layer above.
    """

    adapter: str
    number: int
    state: VersionState
    state_message: str
    error_reason: str
    error_message: str
    digest: str
    files: tuple[VersionFile, ...]
    size_bytes: int
    lora: LoraSummary | None
    base_model: str
    base_model_revision: str
    provenance: str
    metrics: Mapping[str, float]
    aliases: tuple[str, ...]
    owner: str
    create_time: datetime
    update_time: datetime
    etag: str

    @property
    def name(self) -> str:
        return version_name(self.adapter, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasPosition:
    """Where an alias pointed from ``generation`` on."""

    number: int
    generation: int
    set_time: datetime
    set_by: str
    comment: str
    gate_overridden: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name that points at version ``number``. ``history`` is where it pointed before, newest first."""

    adapter: str
    alias: str
    number: int
    generation: int
    history: tuple[AliasPosition, ...]
    gate: AliasGate | None
    create_time: datetime
    update_time: datetime

    @property
    def name(self) -> str:
        return str(AdapterAliasName(self.adapter, self.alias))

    @property
    def version(self) -> str:
        return version_name(self.adapter, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveAdapter:
    """What a model applies where a request names no adapter."""

    model: str
    adapter: str
    enabled: bool
    generation: int
    update_time: datetime


def version_name(adapter: str, number: int) -> str:
    return str(AdapterVersionName(adapter, f"v{number}"))


async def adapters_of(session: AsyncSession, rows: Sequence[AdapterRow]) -> tuple[Adapter, ...]:
    """``rows`` with the counts of their versions."""
    kept = func.count().filter(VersionRow.state != VersionState.RETIRED)
    query = select(VersionRow.adapter, func.max(VersionRow.number), kept).group_by(VersionRow.adapter)
    found = await session.execute(query.where(VersionRow.adapter.in_([row.id for row in rows])))
    counts = {adapter: (latest, number_kept) for adapter, latest, number_kept in found}
    return tuple(_adapter(row, *counts.get(row.id, (None, 0))) for row in rows)


async def adapter_of(session: AsyncSession, row: AdapterRow) -> Adapter:
    (adapter,) = await adapters_of(session, [row])
    return adapter


async def versions_of(session: AsyncSession, rows: Sequence[VersionRow]) -> tuple[Version, ...]:
    """``rows`` with the aliases that point at them now."""
    pointing: dict[tuple[str, int], list[str]] = {}
    query = select(AliasRow.adapter, AliasRow.number, AliasRow.alias).where(AliasRow.number.is_not(None))
    query = query.where(AliasRow.adapter.in_({row.adapter for row in rows})).order_by(AliasRow.alias)
    for adapter, number, alias in await session.execute(query):
        pointing.setdefault((adapter, number or 0), []).append(alias)
    return tuple(_version(row, pointing.get((row.adapter, row.number), ())) for row in rows)


async def version_of(session: AsyncSession, row: VersionRow) -> Version:
    (version,) = await versions_of(session, [row])
    return version


async def aliases_of(session: AsyncSession, rows: Sequence[AliasRow]) -> tuple[Alias, ...]:
    """``rows``, none of them deleted, with their histories."""
    query = select(PositionRow).where(PositionRow.adapter.in_({row.adapter for row in rows}))
    positions: dict[tuple[str, str], list[PositionRow]] = {}
    for position in await session.scalars(query.order_by(PositionRow.generation.desc())):
        positions.setdefault((position.adapter, position.alias), []).append(position)
    return tuple(_alias(row, positions.get((row.adapter, row.alias), ())) for row in rows)


async def alias_of(session: AsyncSession, row: AliasRow) -> Alias:
    (alias,) = await aliases_of(session, [row])
    return alias


def active_of(row: ActiveRow) -> ActiveAdapter:
    return ActiveAdapter(
        model=row.model,
        adapter=row.adapter,
        enabled=row.enabled,
        generation=row.generation,
        update_time=row.update_time,
    )


def _adapter(row: AdapterRow, latest_number: int | None, num_versions: int) -> Adapter:
    return Adapter(
        id=row.id,
        display_name=row.display_name,
        description=row.description,
        base_model=row.base_model,
        labels=json.loads(row.labels_json),
        latest_number=latest_number,
        num_versions=num_versions,
        owner=row.owner,
        create_time=row.create_time,
        update_time=row.update_time,
        etag=str(row.generation),
    )


def _version(row: VersionRow, aliases: Iterable[str]) -> Version:
    files: list[dict[str, Any]] = json.loads(row.files_json)
    return Version(
        adapter=row.adapter,
        number=row.number,
        state=VersionState(row.state),
        state_message=row.state_message,
        error_reason=row.error_reason,
        error_message=row.error_message,
        digest=row.digest,
        files=tuple(VersionFile(**file) for file in files),
        size_bytes=row.size_bytes,
        lora=LoraSummary.from_json(row.facts_json) if row.facts_json else None,
        base_model=row.base_model,
        base_model_revision=row.base_model_revision,
        provenance=row.provenance_json,
        metrics=json.loads(row.metrics_json),
        aliases=tuple(aliases),
        owner=row.owner,
        create_time=row.create_time,
        update_time=row.update_time,
        etag=str(row.generation),
    )


def _alias(row: AliasRow, positions: Iterable[PositionRow]) -> Alias:
    assert row.number is not None
    before = [_position(position) for position in positions if position.generation < row.generation]
    return Alias(
        adapter=row.adapter,
        alias=row.alias,
        number=row.number,
        generation=row.generation,
        history=tuple(before[:MAX_HISTORY]),
        gate=AliasGate.from_json(row.gate_json) if row.gate_json else None,
        create_time=row.create_time,
        update_time=row.update_time,
    )


def _position(row: PositionRow) -> AliasPosition:
    return AliasPosition(
        number=row.number,
        generation=row.generation,
        set_time=row.set_time,
        set_by=row.set_by,
        comment=row.comment,
        gate_overridden=row.gate_overridden,
    )
