"""The queue's one owner: starts jobs in their order where there is room, and adopts those that outlived a service.

A job waits for a free place, then for device memory; the ledger is shared with serving. Jobs that this database says
have processes are taken up again at the start, whoever started them. Event loop; ends only by an error: FencedOut where
a newer service has taken over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy import select

from slipstream_server.errors import (
    DependencyUnavailable,
    FencedOut,
    InternalError,
    OutOfMemory,
    SlipstreamError,
    StorageFull,
)
from slipstream_server.storage.database import Database
from slipstream_server.storage.device_ledger import gib, not_enough
from slipstream_server.training.job_run import JobRun, Surroundings, ledger_name
from slipstream_server.training.publishing import Publisher
from slipstream_server.training.resources import Problem, plan_of, spec_of
from slipstream_server.training.states import ENDED, WITH_PROCESSES, JobState
from slipstream_server.training.tables import JobRow

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PASSING = (StorageFull, DependencyUnavailable)
_ROUND_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A queued job and what it needs of each of its devices."""

    job: str
    device: str
    num_processes: int
    memory_bytes: int


class Supervisor:
    """``capacity_bytes`` is the memory of each device of this machine."""

    def __init__(
        self,
        database: Database,
        around: Surroundings,
        publisher: Publisher,
        *,
        capacity_bytes: Mapping[str, int],
        max_running_jobs: int,
    ) -> None:
        self._database = database
        self._around = around
        self._publisher = publisher
        self._capacity_bytes = capacity_bytes
        self._max_running_jobs = max_running_jobs
        self._bell = asyncio.Event()
        self._bells: dict[str, asyncio.Event] = {}
        self._with_processes: set[str] = set()
        self._not_before_s: dict[str, float] = {}

    def ring(self, job: str = "") -> None:
        """Something about the queue, or about ``job``, has changed."""
        self._bell.set()
        if (bell := self._bells.get(job)) is not None:
            bell.set()

    def forget_wait(self, job: str) -> None:
        """Start ``job`` again without waiting any longer for its retry."""
        self._not_before_s.pop(job, None)

    async def run(self) -> None:
        """Supervise until cancelled; processes are left as they are. Raises FencedOut."""
        await self._patiently(self._around.fence.take_over)
        async with asyncio.TaskGroup() as tasks:
            for job, has_processes in await self._patiently(self._unfinished):
                self._take_up(tasks, job, (), has_processes=has_processes)
            while True:
                self._bell.clear()
                await self._patiently(lambda: self._start_what_can(tasks))
                try:
                    async with asyncio.timeout(_ROUND_S):
                        await self._bell.wait()
                except TimeoutError:
                    pass

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """``work()``, again and again while the database is full or away."""
        while True:
            try:
                return await work()
            except _PASSING as error:
                logger.warning("the supervisor waits: %s", error.message)
                await asyncio.sleep(1.0)

    # The queue

    async def _unfinished(self) -> list[tuple[str, bool]]:
        active = [*WITH_PROCESSES, JobState.PUBLISHING]
        async with self._database.read() as session:
            rows = await session.scalars(select(JobRow).where(JobRow.state.in_(active)))
            return [(row.id, row.state in WITH_PROCESSES) for row in rows]

    async def _start_what_can(self, tasks: asyncio.TaskGroup) -> None:
        blocked: set[str] = set()
        for waiting in await self._queue():
            if len(self._with_processes) >= self._max_running_jobs:
                await self._explain(
                    waiting.job, f"waiting for a free place; {self._max_running_jobs} jobs may run at once"
                )
            elif waiting.device not in blocked:
                try:
                    devices = await asyncio.to_thread(self._reserve, waiting)
                except OutOfMemory as error:
                    # Whoever comes later must not overtake it on the same devices, or it would wait for ever.
                    blocked.add(waiting.device)
                    await self._explain(waiting.job, f"waiting for memory: {error.message}")
                else:
                    self._take_up(tasks, waiting.job, devices, has_processes=True)

    async def _queue(self) -> Sequence[Waiting]:
        """Queued jobs that may start now, in their order."""
        queued = select(JobRow).where(JobRow.state == JobState.QUEUED)
        async with self._database.read() as session:
            rows = await session.scalars(queued.order_by(*QUEUE_ORDER))
            now_s = time.monotonic()
            return [
                Waiting(
                    job=row.id,
                    device=plan_of(row).device,
                    num_processes=spec_of(row).num_processes,
                    memory_bytes=plan_of(row).memory_bytes,
                )
                for row in rows
                if row.id not in self._bells and self._not_before_s.get(row.id, 0.0) <= now_s
            ]

    def _reserve(self, waiting: Waiting) -> tuple[str, ...]:
        """The devices of a job, its memory on them reserved. Raises OutOfMemory."""
        ledger, name = self._around.ledger, ledger_name(waiting.job)
        if waiting.device == "cpu":
            ledger.reserve(name, {"cpu": waiting.memory_bytes * waiting.num_processes}, self._capacity_bytes)
            return ("cpu",)
        gpus = [device for device in self._capacity_bytes if device != "cpu"]
        left = {device: self._capacity_bytes[device] - ledger.reserved_bytes(device) for device in gpus}
        chosen = sorted(gpus, key=lambda device: -left[device])[: waiting.num_processes]
        if len(chosen) < waiting.num_processes:
            raise not_enough(f"{waiting.num_processes} GPUs", waiting.memory_bytes, 0)
        ledger.reserve(name, dict.fromkeys(chosen, waiting.memory_bytes), self._capacity_bytes)
        return tuple(sorted(chosen))

    async def _explain(self, job: str, message: str) -> None:
        async with self._database.read() as session:
            row = await session.get(JobRow, job)
            if row is None or row.state_message == message:
                return
        async with self._around.fence.write() as session:
            row = await session.get(JobRow, job)
            if row is not None and row.state == JobState.QUEUED:
                self._around.journal.explain(row, message)

    # One job

    def _take_up(self, tasks: asyncio.TaskGroup, job: str, devices: tuple[str, ...], *, has_processes: bool) -> None:
        self._bells[job] = asyncio.Event()
        if has_processes:
            self._with_processes.add(job)
        tasks.create_task(self._see_through(job, devices, has_processes=has_processes), name=f"job {job}")

    async def _see_through(self, job: str, devices: tuple[str, ...], *, has_processes: bool) -> None:
        """Accompany ``job`` until it waits or has ended. What goes wrong unforeseen ends the job, not the service."""
        try:
            if has_processes:
                run = JobRun(job, devices, self._around, self._bells[job])
                wait_s = await self._patiently(run.run)
                self._with_processes.discard(job)
                self._bell.set()
                if wait_s is not None:
                    self._not_before_s[job] = time.monotonic() + wait_s
            await self._patiently(lambda: self._publisher.run(job, self._around.folder(job)))
        except FencedOut:
            raise
        except SlipstreamError as error:
            logger.error("job %s: %s", job, error.message)
            await self._patiently(partial(self._fail, job, error))
        except Exception:
            logger.exception("job %s failed unexpectedly", job)
            unforeseen = InternalError("the job could not be supervised; the service's log tells why")
            await self._patiently(partial(self._fail, job, unforeseen))
        finally:
            self._with_processes.discard(job)
            self._bells.pop(job, None)
            self._bell.set()

    async def _fail(self, job: str, error: SlipstreamError) -> None:
        async with self._around.fence.write() as session:
            row = await session.get(JobRow, job)
            if row is not None and row.state not in ENDED:
                problem = Problem(reason=error.reason, message=error.message, metadata=error.metadata)
                await self._around.journal.move(session, row, JobState.FAILED, problem=problem)


QUEUE_ORDER = (JobRow.priority.desc(), JobRow.create_time, JobRow.id)


def check_can_ever_fit(device: str, num_processes: int, memory_bytes: int, capacity_bytes: Mapping[str, int]) -> None:
    """Raises OutOfMemory, with the numbers, for a job that no device of this machine could hold."""
    if device == "cpu":
        largest, needed = capacity_bytes.get("cpu", 0), memory_bytes * num_processes
    else:
        gpus = sorted((size for name, size in capacity_bytes.items() if name != "cpu"), reverse=True)
        largest = gpus[num_processes - 1] if len(gpus) >= num_processes else 0
        needed = memory_bytes
    if needed > largest:
        raise OutOfMemory(
            f"the job needs {gib(needed)} on {device}, and the machine has {gib(largest)}",
            metadata={"device": device, "needed_bytes": str(needed), "capacity_bytes": str(largest)},
        )
