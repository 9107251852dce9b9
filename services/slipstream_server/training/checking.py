"""Reads what has arrived and was not read yet: rows of datasets, then specifications and rows of jobs.

What waits is known by the states in the database, so that a service that died goes on where it was. A task of the
service; a full or locked database makes it wait, not end. Event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from sqlalchemy import select

from slipstream_server.errors import SlipstreamError
from slipstream_server.storage.database import Database
from slipstream_server.training.datasets import Datasets
from slipstream_server.training.states import JobState
from slipstream_server.training.tables import JobRow
from slipstream_server.training.validation import JobValidator

logger = logging.getLogger(__name__)

_ROUND_S = 5.0
_MAX_AT_ONCE = 2


class Checking:
    """``on_queued`` is told when a job may have come into the queue."""

    def __init__(
        self, database: Database, datasets: Datasets, validator: JobValidator, on_queued: Callable[[], None]
    ) -> None:
        self._database = database
        self._datasets = datasets
        self._validator = validator
        self._on_queued = on_queued
        self._bell = asyncio.Event()
        self._running: set[str] = set()
        self._ended: dict[str, asyncio.Event] = {}
        self._places = asyncio.Semaphore(_MAX_AT_ONCE)

    def ring(self) -> None:
        """Something new is there."""
        self._bell.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._bell.clear()
                try:
                    await self._begin(tasks)
                except SlipstreamError as error:
                    logger.warning("checks are put off: %s", error.message)
                try:
                    async with asyncio.timeout(_ROUND_S):
                        await self._bell.wait()
                except TimeoutError:
                    pass

    async def settled(self, name: str, timeout_s: float) -> None:
        """Return when the check of ``name`` ("datasets/..." or "trainingJobs/...") has ended, or the time is over."""
        ended = self._ended.setdefault(name, asyncio.Event())
        self.ring()
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            self._ended.pop(name, None)

    async def _begin(self, tasks: asyncio.TaskGroup) -> None:
        for dataset in await self._datasets.unchecked():
            self._check(tasks, f"datasets/{dataset}", partial(self._datasets.check, dataset))
        waiting = select(JobRow.id).where(JobRow.state == JobState.VALIDATING).order_by(JobRow.create_time)
        async with self._database.read() as session:
            jobs = tuple(await session.scalars(waiting))
        for job in jobs:
            self._check(tasks, f"trainingJobs/{job}", partial(self._validator.run, job))

    def _check(self, tasks: asyncio.TaskGroup, name: str, work: Callable[[], Awaitable[None]]) -> None:
        if name not in self._running:
            self._running.add(name)
            tasks.create_task(self._run(name, work), name=f"check {name}")

    async def _run(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            async with self._places:
                await work()
        except SlipstreamError as error:
            logger.warning("the check of %s is put off: %s", name, error.message)
            await asyncio.sleep(1.0)
        finally:
            self._running.discard(name)
            if (ended := self._ended.pop(name, None)) is not None:
                ended.set()
            self._on_queued()
            self._bell.set()
