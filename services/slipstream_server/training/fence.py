"""Who may supervise jobs: the service that said so last.

Each service takes a number when it begins, larger than all before; every write of its supervisor looks, in the same
transaction, whether that is still the largest. One that slept meanwhile cannot write over what its successor did.
Event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.errors import FencedOut
from slipstream_server.storage.database import Database
from slipstream_server.training.tables import SupervisorRow


class Fence:
    """The supervisor's writes to one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._token = 0

    async def take_over(self) -> int:
        """Take the next number; from now on every earlier supervisor is refused."""
        async with self._database.write() as session:
            row = await session.get(SupervisorRow, True)
            if row is None:
                row = SupervisorRow(one=True, token=0)
                session.add(row)
            row.token += 1
            self._token = row.token
        return self._token

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """As ``Database.write``. Raises FencedOut, having written nothing, where another service has taken over."""
        async with self._database.write() as session:
            row = await session.get(SupervisorRow, True)
            if row is None or row.token != self._token:
                raise FencedOut("another training service supervises the jobs of this database now")
            yield session
