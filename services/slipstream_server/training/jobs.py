"""Stored jobs: made, read, listed and deleted by their owner; cancelled, paused and resumed by orders that the
supervisor carries out.

Another owner's job does not exist. A job without processes is moved at once, by whoever asks; one with processes only
by its supervisor. Event loop.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.errors import (
    CheckpointNotFound,
    InvalidField,
    JobNotFound,
    QueueFull,
    ResourceExists,
    StaleEtag,
)
from slipstream_server.resource_names import new_id
from slipstream_server.storage.database import Database
from slipstream_server.storage.event_log import StoredEvent
from slipstream_server.storage.pages import Page, PageRequest, read_page
from slipstream_server.storage.request_records import RequestKey
from slipstream_server.training.checkpoints import discard_after
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.journal import Journal
from slipstream_server.training.resources import Checkpoint, Job, as_json, checkpoint_of, job_of
from slipstream_server.training.specification import JobSpec
from slipstream_server.training.states import (
    ENDED,
    PAUSABLE,
    RESUMABLE,
    WITH_PROCESSES,
    JobState,
    Order,
    wrong_state,
)
from slipstream_server.training.supervisor import QUEUE_ORDER
from slipstream_server.training.tables import EVENTS, REQUESTS, CheckpointRow, JobRow

_WAITING = (JobState.VALIDATING, JobState.QUEUED)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDetails:
    """What the maker of a job says about it. ``id`` empty: chosen here."""

    id: str = ""
    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class Jobs:
    """The jobs of one database, whose files are below ``folder``."""

    def __init__(self, database: Database, journal: Journal, folder: Path, *, max_waiting: int = 1000) -> None:
        self._database = database
        self._journal = journal
        self._folder = folder
        self._max_waiting = max_waiting

    # Made and read

    async def repeated(self, key: RequestKey) -> Job | None:
        """The job that was made for ``key``, None for a new request. Raises RequestIdReused, JobNotFound."""
        async with self._database.read() as session:
            known = await REQUESTS.get(session, key)
            if known is None or known.response is None:
                return None
            return await self._seen(session, await find_job(session, key.owner, known.response.decode()))

    async def check_new(self, job_id: str) -> None:
        """Raises ResourceExists where there is such a job."""
        async with self._database.read() as session:
            await _check_free(session, job_id)

    async def add(self, owner: str, details: JobDetails, spec: JobSpec, *, key: RequestKey | None = None) -> Job:
        """A new job in VALIDATING. Raises ResourceExists, RequestIdReused, QueueFull."""
        async with self._database.write() as session:
            if key is not None and (known := await REQUESTS.get_or_claim(session, key)) is not None and known.response:
                return await self._seen(session, await find_job(session, owner, known.response.decode()))
            await _check_free(session, details.id)
            await self._check_room(session)
            row = _new_row(owner, details, spec)
            session.add(row)
            await session.flush()
            await self._journal.begin(session, row)
            if key is not None:
                await REQUESTS.answer(session, key, row.id.encode())
            return job_of(row)

    async def get(self, owner: str, job_id: str) -> Job:
        async with self._database.read() as session:
            return await self._seen(session, await find_job(session, owner, job_id))

    async def list(self, owner: str, states: Collection[JobState], page_size: int, page_token: str) -> Page[Job]:
        """The owner's jobs in one of ``states`` (none given: in any), newest first."""
        page = PageRequest(query=("jobs", owner, *sorted(states)), page_size=page_size, page_token=page_token)
        rows = select(JobRow).where(JobRow.owner == owner)
        if states:
            rows = rows.where(JobRow.state.in_(states))
        async with self._database.read() as session:
            found = await read_page(session, rows, (JobRow.create_time, JobRow.id), page, descending=True)
            return Page(tuple([await self._seen(session, row) for row in found.items]), found.next_page_token)

    async def checkpoints(self, owner: str, job_id: str, page_size: int, page_token: str) -> Page[Checkpoint]:
        """The job's complete checkpoints, newest first."""
        page = PageRequest(query=("checkpoints", owner, job_id), page_size=page_size, page_token=page_token)
        rows = select(CheckpointRow).where(CheckpointRow.job == job_id)
        async with self._database.read() as session:
            await find_job(session, owner, job_id)
            found = await read_page(session, rows, (CheckpointRow.step,), page, descending=True)
            return Page(tuple(checkpoint_of(row) for row in found.items), found.next_page_token)

    async def watch(self, owner: str, job_id: str, after_sequence: int) -> AsyncGenerator[Sequence[StoredEvent], None]:
        """Events after ``after_sequence`` in batches, until the one of the job's last state. Raises InvalidField."""
        job = await self.get(owner, job_id)
        if not 0 <= after_sequence <= job.last_sequence:
            raise InvalidField.of(
                "after_sequence", f"{after_sequence} is not from 0 to {job.last_sequence}, the last event"
            )
        if job.state in ENDED and after_sequence == job.last_sequence:
            return
        async with aclosing(EVENTS.follow(self._database, job_id, after_sequence)) as batches:
            async for batch in batches:
                yield batch
                job = await self.get(owner, job_id)
                if job.state in ENDED and job.last_sequence == batch[-1].sequence:
                    return

    # Ended, stopped, resumed

    async def delete(self, owner: str, job_id: str, etag: str) -> None:
        """Raises WrongState where it has not ended, StaleEtag."""
        async with self._database.write() as session:
            row = await find_job(session, owner, job_id)
            if etag not in ("", str(row.generation)):
                raise StaleEtag(f"etag: {etag[:40]!a} is not that of the stored job; read it again")
            if row.state not in ENDED:
                raise wrong_state(JobState(row.state), "only jobs that have ended can be deleted")
            await EVENTS.forget(session, job_id)
            await session.delete(row)
        await asyncio.to_thread(shutil.rmtree, self._folder / job_id, ignore_errors=True)

    async def cancel(self, owner: str, job_id: str, grace_s: int) -> Job:
        """End a job without processes, or order it of the supervisor. Raises WrongState where it ended otherwise."""
        async with self._database.write() as session:
            row = await find_job(session, owner, job_id)
            state = JobState(row.state)
            if state in ENDED and state is not JobState.CANCELLED:
                raise wrong_state(state, "it has ended and cannot be cancelled")
            if state in WITH_PROCESSES or state is JobState.PUBLISHING:
                row.wish, row.wish_grace_s = Order.CANCEL, grace_s
            elif state is not JobState.CANCELLED:
                await self._journal.move(session, row, JobState.CANCELLED)
            return await self._seen(session, row)

    async def pause(self, owner: str, job_id: str) -> Job:
        """Take a job out of the queue, or order its stop of the supervisor. Raises WrongState."""
        async with self._database.write() as session:
            row = await find_job(session, owner, job_id)
            state = JobState(row.state)
            if state not in PAUSABLE:
                raise wrong_state(state, "only queued, starting and running jobs can be paused")
            if state is JobState.QUEUED:
                await self._journal.move(session, row, JobState.PAUSED)
            elif row.wish != Order.CANCEL:
                row.wish = Order.PAUSE
            return await self._seen(session, row)

    async def resume(self, owner: str, job_id: str, step: int | None) -> Job:
        """Queue a stopped job again, from the checkpoint at ``step`` or the last one.

        Raises WrongState, CheckpointNotFound, QueueFull.
        """
        async with self._database.write() as session:
            row = await find_job(session, owner, job_id)
            await self._check_resumable(session, row, step)
            await self._check_room(session)
            if step is not None:
                later = (CheckpointRow.job == job_id, CheckpointRow.step > step)
                await session.execute(delete(CheckpointRow).where(*later))
                # No process of the job is left that could write there.
                await asyncio.to_thread(discard_after, JobFolder(self._folder / job_id).checkpoints, step)
            row.num_retries = 0
            await self._journal.move(session, row, JobState.QUEUED)
            return await self._seen(session, row)

    async def _check_resumable(self, session: AsyncSession, row: JobRow, step: int | None) -> None:
        state = JobState(row.state)
        if state not in RESUMABLE or not row.plan_json:
            raise wrong_state(state, "only paused jobs, and ended ones with a checkpoint, go on")
        steps = set(await session.scalars(select(CheckpointRow.step).where(CheckpointRow.job == row.id)))
        if step is not None and step not in steps:
            raise CheckpointNotFound(f"trainingJobs/{row.id} has no complete checkpoint at step {step}")
        if state is not JobState.PAUSED and not steps:
            raise wrong_state(state, "it has no checkpoint to go on from")

    async def _check_room(self, session: AsyncSession) -> None:
        waiting = select(func.count()).select_from(JobRow).where(JobRow.state.in_(_WAITING))
        if (await session.execute(waiting)).scalar_one() >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} jobs wait already", retry_after_s=60.0)

    async def _seen(self, session: AsyncSession, row: JobRow) -> Job:
        return job_of(row, await _queue_position(session, row))


async def find_job(session: AsyncSession, owner: str, job_id: str) -> JobRow:
    """Raises JobNotFound, also for another owner's."""
    row = await session.get(JobRow, job_id)
    if row is None or row.owner != owner:
        raise JobNotFound(f"there is no job trainingJobs/{job_id}")
    return row


async def _check_free(session: AsyncSession, job_id: str) -> None:
    if job_id and await session.get(JobRow, job_id) is not None:
        raise ResourceExists(f"there is a job trainingJobs/{job_id} already")


async def _queue_position(session: AsyncSession, row: JobRow) -> int:
    if row.state != JobState.QUEUED:
        return 0
    queue = list(await session.scalars(select(JobRow.id).where(JobRow.state == JobState.QUEUED).order_by(*QUEUE_ORDER)))
    return queue.index(row.id) + 1 if row.id in queue else 0


def _new_row(owner: str, details: JobDetails, spec: JobSpec) -> JobRow:
    return JobRow(
        id=details.id or new_id("job"),
        owner=owner,
        display_name=details.display_name,
        labels_json=json.dumps(dict(details.labels), sort_keys=True),
        dataset=spec.dataset,
        spec_json=as_json(spec),
        state=JobState.VALIDATING,
        priority=spec.priority,
    )
