"""A model's active adapter: what it applies where a request names none. Event loop.

Models live in another service: their names are checked for their form only, and a model that does not exist yet may
have its default set.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.journal import Entry, Journal
from slipstream_server.adapters.references import Reference, resolve
from slipstream_server.adapters.resources import active_of
from slipstream_server.adapters.tables import SERVABLE, ActiveRow
from slipstream_server.errors import IncompatibleAdapter, InvalidField, StaleGeneration, WrongState
from slipstream_server.storage.database import Database

_SERVED = "models/"


class ActiveAdapters:
    """The active adapters of one database."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self._database = database
        self._journal = journal

    async def set(
        self, owner: str, model: str, adapter: str, reference: Reference | None, expected_generation: int | None
    ) -> Entry:
        """Make ``adapter`` the model's default and enable it; ``reference`` is what it says, None for no adapter.

        Raises AdapterNotFound, AdapterVersionNotFound, AliasNotFound, AliasMissing, StaleGeneration, WrongState,
        IncompatibleAdapter.
        """
        if expected_generation is not None and expected_generation < 0:
            raise InvalidField.of("expected_generation", f"{expected_generation} is below 0")
        async with self._database.write() as session:
            row = await _row(session, owner, model)
            if expected_generation not in (None, row.generation):
                raise StaleGeneration(
                    f"expected_generation: {expected_generation} was read, but the active adapter of {model!r} is at"
                    f" generation {row.generation}; read it again",
                    metadata={"generation": str(row.generation)},
                )
            if reference is not None:
                await _check_servable(session, reference, model)
            row.adapter = adapter
            row.adapter_id = reference.adapter if reference else ""
            row.number = reference.number if reference else None
            return await self._changed(session, row, enabled=reference is not None)

    async def disable(self, owner: str, model: str) -> Entry:
        """Let the model answer with its base weights; nothing happens where it does already."""
        async with self._database.write() as session:
            row = await _row(session, owner, model)
            if row.generation and not row.enabled:
                return await self._journal.last(session, active_of(row))
            return await self._changed(session, row, enabled=False)

    async def enable(self, owner: str, model: str) -> Entry:
        """Apply the active adapter again; nothing happens where it is. Raises WrongState where there is none."""
        async with self._database.write() as session:
            row = await _row(session, owner, model)
            if not row.adapter:
                raise WrongState(f"model {model!r} has no active adapter; set one first")
            if row.enabled:
                return await self._journal.last(session, active_of(row))
            return await self._changed(session, row, enabled=True)

    async def _changed(self, session: AsyncSession, row: ActiveRow, *, enabled: bool) -> Entry:
        row.enabled, row.generation = enabled, row.generation + 1
        session.add(row)
        await session.flush()
        return await self._journal.write(session, active_of(row))


async def _row(session: AsyncSession, owner: str, model: str) -> ActiveRow:
    """The model's row, or a new one of generation 0 that is not in the session yet."""
    row = await session.get(ActiveRow, model)
    return row or ActiveRow(
        model=model, owner=owner, adapter="", adapter_id="", number=None, enabled=False, generation=0
    )


async def _check_servable(session: AsyncSession, reference: Reference, model: str) -> None:
    version = await resolve(session, reference)
    if version.state not in SERVABLE:
        raise WrongState(f"{version.adapter}@v{version.number} is {version.state}", metadata={"state": version.state})
    # A base by its source may be what the model serves; another model's name never is.
    if version.base_model.startswith(_SERVED) and version.base_model != f"{_SERVED}{model}":
        raise IncompatibleAdapter(
            f"{version.adapter}@v{version.number} is for the base {version.base_model[:120]!a}, and model {model!a} is"
            " another"
        )
