"""What goes by itself: expired request ids, artifacts without a dataset, folders without a job, old jobs' checkpoints.

Runs at start and then at intervals. A round that fails is logged and tried again: a full or locked database must not
stop the service that would still answer. Event loop; files are removed in threads.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import delete, select

from slipstream_server.errors import SlipstreamError
from slipstream_server.storage import garbage
from slipstream_server.storage.artifacts import ArtifactStore
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.states import ENDED
from slipstream_server.training.tables import REQUESTS, CheckpointRow, DatasetRow, JobRow

INTERVAL_S = 600.0
_MOMENT_S = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the service keeps files: a folder for each job, and the datasets that were unpacked to be read."""

    jobs: Path
    cache: Path


class Housekeeping:
    """Cleans one database, its store and its folders. ``kept`` is how long an ended job keeps its files."""

    def __init__(
        self,
        database: Database,
        store: ArtifactStore,
        places: Places,
        *,
        kept: timedelta,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._database = database
        self._store = store
        self._places = places
        self._kept = kept
        self._interval_s = interval_s

    async def run(self) -> None:
        """Rounds for ever."""
        while True:
            try:
                await self.round()
            except SlipstreamError as error:
                logger.warning("housekeeping was put off: %s", error.message)
            await asyncio.sleep(self._interval_s)

    async def round(self, grace: timedelta = garbage.DEFAULT_GRACE) -> garbage.Collected:
        """One cleaning; what is younger than ``grace`` stays in the store."""
        async with self._database.write() as session:
            await REQUESTS.purge(session)
        await self._remove_old_files()
        await self._remove_unowned(self._places.jobs, self._jobs)
        await self._remove_unowned(self._places.cache, self._artifacts)
        return await garbage.collect(self._store, self._artifacts, grace)

    async def _remove_old_files(self) -> None:
        """Jobs that ended long ago lose their files, and with them their checkpoints; what is told of them stays."""
        ended = select(JobRow.id).where(JobRow.state.in_(ENDED), JobRow.end_time < utc_now() - self._kept)
        async with self._database.read() as session:
            old = [job for job in await session.scalars(ended) if (self._places.jobs / job).exists()]
        for job in old:
            async with self._database.write() as session:
                row = await session.get(JobRow, job)
                if row is None or row.state not in ENDED:
                    continue
                await session.execute(delete(CheckpointRow).where(CheckpointRow.job == job))
                # In the transaction, so that nobody resumes it meanwhile.
                await asyncio.to_thread(_remove, JobFolder(self._places.jobs / job).path)
            logger.info("the files of job %s are gone: it ended more than %s ago", job, self._kept)

    async def _remove_unowned(self, folder: Path, owners: garbage.References) -> None:
        # Listed before the owners are read: a folder is never older than its row.
        found = await asyncio.to_thread(_unused, folder)
        owned = await owners() if found else frozenset()
        for path in found:
            if path.name not in owned:
                await asyncio.to_thread(_remove, path)

    async def _jobs(self) -> AbstractSet[str]:
        async with self._database.read() as session:
            return frozenset(await session.scalars(select(JobRow.id)))

    async def _artifacts(self) -> AbstractSet[str]:
        async with self._database.read() as session:
            return frozenset(await session.scalars(select(DatasetRow.artifact)))


def _unused(folder: Path) -> list[Path]:
    """The entries of ``folder`` that were not made a moment ago, for a check that keeps nothing."""
    before_s = time.time() - _MOMENT_S
    return [path for path in folder.iterdir() if path.stat().st_mtime < before_s] if folder.is_dir() else []


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
