"""Aliases: moved by compare-and-set, moved back, deleted. Each change is one transaction and one event. Event loop.

Every successful ``set`` and ``roll_back`` is a new generation, also where the alias stays on its version; generations
of an alias never fall and are never given twice, not even over its deletion.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.adapters import check_text, find_adapter
from slipstream_server.adapters.gate import AliasGate
from slipstream_server.adapters.journal import AliasDeleted, Entry, Journal
from slipstream_server.adapters.references import Reference, find_alias, resolve
from slipstream_server.adapters.resources import MAX_HISTORY, Alias, alias_of, aliases_of, version_of
from slipstream_server.adapters.tables import REQUESTS, SERVABLE, AliasRow, PositionRow, VersionRow, VersionState
from slipstream_server.errors import GateClosed, InvalidField, StaleGeneration, WrongState
from slipstream_server.resource_names import AdapterAliasName
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.pages import Page, PageRequest, read_page
from slipstream_server.storage.request_records import RequestKey

MAX_COMMENT_CHARS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Who moves an alias, and why. ``expected_generation``: 0 for an alias that must not exist, None for any."""

    by: str
    comment: str = ""
    expected_generation: int | None = None

    def __post_init__(self) -> None:
        check_text("comment", self.comment, MAX_COMMENT_CHARS)
        if self.expected_generation is not None and self.expected_generation < 0:
            raise InvalidField.of("expected_generation", f"{self.expected_generation} is below 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateUse:
    """``gate``: a new one for the alias, an empty one to take it away, None to leave it; ``override``: pass anyway."""

    gate: AliasGate | None = None
    override: bool = False


class Aliases:
    """The aliases of one database."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal

    async def get(self, name: AdapterAliasName) -> Alias:
        """Raises AdapterNotFound, AliasNotFound."""
        async with self._database.read() as session:
            return await alias_of(session, await find_alias(session, name.adapter, name.alias))

    async def list(self, adapter: str, page_size: int, page_token: str) -> Page[Alias]:
        """Aliases by their ids. Raises AdapterNotFound."""
        page = PageRequest(query=("aliases", adapter), page_size=page_size, page_token=page_token)
        rows = select(AliasRow).where(AliasRow.adapter == adapter, AliasRow.number.is_not(None))
        async with self._database.read() as session:
            await find_adapter(session, adapter)
            found = await read_page(session, rows, (AliasRow.alias,), page)
            return Page(await aliases_of(session, found.items), found.next_page_token)

    async def set(
        self, name: AdapterAliasName, target: Reference, move: Move, gate: GateUse, *, key: RequestKey | None = None
    ) -> Entry:
        """Point the alias at what ``target`` means now; the event that says so (for a repeated ``key``: the first one).

        Raises AdapterNotFound, AdapterVersionNotFound, AliasNotFound (of the target), StaleGeneration, WrongState,
        GateClosed, RequestIdReused.
        """
        async with self._database.write() as session:
            if key is not None and (known := await REQUESTS.get_or_claim(session, key)) is not None:
                return Entry.from_bytes(known.response or b"")
            return await self._move(session, *await _judged(session, name, target, move, gate), move, key)

    async def check(self, name: AdapterAliasName, target: Reference, move: Move, gate: GateUse) -> Alias | None:
        """Raise what ``set`` would; the alias as it stays, None where there is none."""
        async with self._database.read() as session:
            row, _, _, _ = await _judged(session, name, target, move, gate)
            return None if row.number is None else await alias_of(session, row)

    async def roll_back(
        self, name: AdapterAliasName, target_generation: int | None, move: Move, *, key: RequestKey | None = None
    ) -> Entry:
        """Point the alias at an earlier position: that of ``target_generation``, or the last one on another version.

        Gates are not asked. Raises AdapterNotFound, AliasNotFound, StaleGeneration, WrongState, RequestIdReused.
        """
        async with self._database.write() as session:
            if key is not None and (known := await REQUESTS.get_or_claim(session, key)) is not None:
                return Entry.from_bytes(known.response or b"")
            row = await find_alias(session, name.adapter, name.alias)
            _check_generation(row, move)
            version = await _earlier(session, row, target_generation)
            return await self._move(session, row, version, row.gate_json, False, move, key)

    async def delete(self, name: AdapterAliasName, move: Move) -> Entry:
        """Delete the alias; its generations go on should it be made again.

        Raises AdapterNotFound, AliasNotFound, StaleGeneration.
        """
        async with self._database.write() as session:
            row = await find_alias(session, name.adapter, name.alias)
            _check_generation(row, move)
            positions = delete(PositionRow).where(PositionRow.adapter == row.adapter, PositionRow.alias == row.alias)
            await session.execute(positions)
            row.number, row.generation, row.gate_json = None, row.generation + 1, ""
            (await find_adapter(session, name.adapter)).update_time = utc_now()
            return await self._journal.write(session, AliasDeleted(str(name)))

    async def _move(
        self,
        session: AsyncSession,
        row: AliasRow,
        version: VersionRow,
        gate_json: str,
        gate_overridden: bool,
        move: Move,
        key: RequestKey | None,
    ) -> Entry:
        now = utc_now()
        if row.number is None:  # new, or made again after its deletion
            row.owner, row.create_time = move.by, now
        row.number, row.generation, row.gate_json = version.number, row.generation + 1, gate_json
        row.update_time = now
        session.add(row)
        await session.flush()
        session.add(
            PositionRow(
                adapter=row.adapter,
                alias=row.alias,
                generation=row.generation,
                number=version.number,
                set_time=now,
                set_by=move.by,
                comment=move.comment,
                gate_overridden=gate_overridden,
            )
        )
        await session.flush()
        await _forget_old_positions(session, row)
        (await find_adapter(session, row.adapter)).update_time = now
        entry = await self._journal.write(session, await alias_of(session, row))
        if key is not None:
            await REQUESTS.answer(session, key, entry.to_bytes())
        return entry


async def _judged(
    session: AsyncSession, name: AdapterAliasName, target: Reference, move: Move, gate: GateUse
) -> tuple[AliasRow, VersionRow, str, bool]:
    """What a move would make of the alias: its row (a new one where there is none), version, gate, gate overridden."""
    version = await resolve(session, target)
    row = await session.get(AliasRow, (name.adapter, name.alias))
    if row is None:
        row = AliasRow(adapter=name.adapter, alias=name.alias, number=None, generation=0, gate_json="", owner=move.by)
    _check_generation(row, move)
    if version.state not in SERVABLE:
        raise WrongState(
            f"{version.adapter}@v{version.number} is {version.state}; only registered and verified versions can be"
            " served",
            metadata={"state": version.state},
        )
    gate_json = row.gate_json if gate.gate is None else "" if gate.gate.is_empty else gate.gate.to_json()
    return row, version, gate_json, await _is_overridden(session, row, version, gate_json, gate.override)


async def _is_overridden(
    session: AsyncSession, row: AliasRow, version: VersionRow, gate_json: str, override: bool
) -> bool:
    """Whether the gate is closed and was to be passed all the same. Raises GateClosed where it was not."""
    if not gate_json:
        return False
    current = None if row.number is None else await session.get(VersionRow, (row.adapter, row.number))
    figures = {} if current is None else (await version_of(session, current)).metrics
    candidate = (await version_of(session, version)).metrics
    try:
        AliasGate.from_json(gate_json).check(candidate, figures, is_verified=version.state == VersionState.VERIFIED)
    except GateClosed:
        if not override:
            raise
        return True
    return False


def _check_generation(row: AliasRow, move: Move) -> None:
    existing = row.generation if row.number is not None else 0
    if move.expected_generation is not None and move.expected_generation != existing:
        stands = f"is at generation {existing}" if existing else "does not exist"
        raise StaleGeneration(
            f"expected_generation: {move.expected_generation} was read, but {row.adapter}@{row.alias} {stands}; read it"
            " again",
            metadata={"generation": str(existing)},
        )


async def _earlier(session: AsyncSession, row: AliasRow, target_generation: int | None) -> VersionRow:
    """The version to go back to. Raises WrongState where there is none, or it cannot be served any more."""
    history = (await alias_of(session, row)).history
    if target_generation is None:
        found = next((position for position in history if position.number != row.number), None)
    else:
        found = next((position for position in history if position.generation == target_generation), None)
    if found is None:
        wanted = "no earlier version" if target_generation is None else f"no generation {target_generation}"
        raise WrongState(f"{row.adapter}@{row.alias} has {wanted} in its history to go back to")
    version = await session.get(VersionRow, (row.adapter, found.number))
    if version is None or version.state not in SERVABLE:
        state = "gone" if version is None else version.state
        raise WrongState(
            f"{row.adapter}@v{found.number}, to which {row.alias!r} would go back, is {state}",
            metadata={"state": state},
        )
    return version


async def _forget_old_positions(session: AsyncSession, row: AliasRow) -> None:
    """Keep the present position and MAX_HISTORY before it."""
    mine = (PositionRow.adapter == row.adapter, PositionRow.alias == row.alias)
    newest_first = select(PositionRow.generation).where(*mine).order_by(PositionRow.generation.desc())
    oldest = (await session.scalars(newest_first.offset(MAX_HISTORY).limit(1))).first()
    if oldest is not None:
        await session.execute(delete(PositionRow).where(*mine, PositionRow.generation < oldest))
