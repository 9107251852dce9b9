"""What goes by itself: expired request ids, old events, artifacts that no version refers to. A task of the service.

Runs at start and then at intervals. A round that fails is logged and tried again: a full or locked database must not
stop the service that would still answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set as AbstractSet
from datetime import timedelta

from sqlalchemy import select

from slipstream_server.adapters.journal import KEPT_EVENTS, STREAM
from slipstream_server.adapters.tables import EVENTS, REQUESTS, VersionRow, VersionState
from slipstream_server.errors import SlipstreamError
from slipstream_server.storage import garbage
from slipstream_server.storage.artifacts import ArtifactStore
from slipstream_server.storage.database import Database

INTERVAL_S = 600.0

logger = logging.getLogger(__name__)


class Housekeeping:
    """Cleans one database and the store its versions refer to."""

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        *,
        interval_s: float = INTERVAL_S,
        kept_events: int = KEPT_EVENTS,
    ) -> None:
        self._database = database
        self._store = store
        self._interval_s = interval_s
        self._kept_events = kept_events

    async def run(self) -> None:
        """Rounds for ever."""
        while True:
            try:
                await self.round()
            except (SlipstreamError, OSError) as error:
                logger.warning("housekeeping was put off: %s", error)
            await asyncio.sleep(self._interval_s)

    async def round(self, grace: timedelta = garbage.DEFAULT_GRACE) -> garbage.Collected:
        """One cleaning; what is younger than ``grace`` stays in the store."""
        async with self._database.write() as session:
            await REQUESTS.purge(session)
            last = (await EVENTS.bounds(session, STREAM)).last
            await EVENTS.trim(session, STREAM, last - self._kept_events)
        return await garbage.collect(self._store, self._references, grace)

    async def _references(self) -> AbstractSet[str]:
        gone = (VersionState.RETIRED, VersionState.FAILED)
        digests = select(VersionRow.digest).where(VersionRow.state.not_in(gone), VersionRow.digest != "")
        async with self._database.read() as session:
            return frozenset(await session.scalars(digests))
