"""One job for as long as it has processes: starts them or finds them again, takes their events, and says how it ended.

    stored: attempt with its mark -> processes -> stored: pid and start -> events, until the first process has ended
    -> none of the others is left -> the rest of the events -> result, order, failure: the job's next state

Each line survives the death of this service at any point: the next one finds the tree by what is stored, and an attempt
whose mark nobody carries has no process. Event loop; what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.errors import (
    CorruptArtifact,
    DeadlineExceeded,
    DependencyUnavailable,
    FencedOut,
    StorageFull,
    WorkerDied,
)
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.device_ledger import DeviceLedger
from slipstream_server.storage.process_identity import ProcessIdentity
from slipstream_server.training import events as spool
from slipstream_server.training import process_tree
from slipstream_server.training.fence import Fence
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.journal import AttemptFailed, JobEvent, Journal
from slipstream_server.training.process_tree import LaunchOrder
from slipstream_server.training.resources import Outcome, Problem, as_json, plan_of, spec_of
from slipstream_server.training.result import TrainingResult, read_result
from slipstream_server.training.retries import retry_after
from slipstream_server.training.spool_intake import SpoolIntake, Taken, ending_of
from slipstream_server.training.states import WITH_PROCESSES, JobState, Order
from slipstream_server.training.tables import AttemptRow, JobRow

logger = logging.getLogger(__name__)

POLL_S = 0.25
PAUSE_GRACE_S = 120.0
_PASSING = (StorageFull, DependencyUnavailable)
Command = Callable[[LaunchOrder], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every run of a job needs. ``jobs`` holds a folder for each."""

    fence: Fence
    journal: Journal
    intake: SpoolIntake
    ledger: DeviceLedger
    jobs: Path
    command: Command = process_tree.runner_command

    def folder(self, job: str) -> JobFolder:
        return JobFolder(self.jobs / job)


class JobRun:
    """``bell`` rings when somebody has ordered something of the job."""

    def __init__(self, job: str, devices: tuple[str, ...], around: Surroundings, bell: asyncio.Event) -> None:
        self._job = job
        self._devices = devices
        self._around = around
        self._bell = bell
        self._folder = around.folder(job)
        self._number = 0
        self._mark = ""
        self._is_overdue = False
        self._resumes = True

    async def run(self) -> float | None:
        """Return when no process of the job is left and its state says so: seconds until a retry, or None.

        Cancelling it leaves the processes as they are, and so do StorageFull and DependencyUnavailable: run it again.
        Raises FencedOut, and InternalError where processes cannot be ended.
        """
        try:
            return await self._run()
        except (FencedOut, *_PASSING):
            raise
        except Exception:
            await asyncio.to_thread(process_tree.kill_tree, self._mark)
            await asyncio.to_thread(self._around.ledger.release, ledger_name(self._job))
            raise

    async def _run(self) -> float | None:
        root = await self._start_or_find()
        if root is None:
            await asyncio.to_thread(self._around.ledger.release, ledger_name(self._job))
            return None
        deadline_s = await self._deadline_s()
        self._bell.set()
        while True:
            # Looked at before reading: what was written before the end is then read after it.
            is_running = process_tree.is_running(root)
            taken = await self._take_events()
            if taken is Taken.THE_LAST:
                # Everything is on the disk, and taking a runtime down can take as long as a short training.
                await asyncio.to_thread(process_tree.kill_tree, self._mark)
            if taken is not Taken.NOTHING:
                continue
            if not is_running:
                break
            if (grace_s := await self._ordered_grace_s(deadline_s)) is not None:
                await asyncio.to_thread(process_tree.end_tree, self._mark, grace_s)
                continue
            await _rung(self._bell, POLL_S)
        await asyncio.to_thread(process_tree.end_tree, self._mark, PAUSE_GRACE_S)
        while await self._take_events() is not Taken.NOTHING:
            pass
        wait_s = await self._conclude()
        if wait_s is not None and not self._resumes:
            await asyncio.to_thread(shutil.rmtree, self._folder.checkpoints, ignore_errors=True)
        return wait_s

    # Processes

    async def _start_or_find(self) -> ProcessIdentity | None:
        """The tree's first process; None where somebody took the job out of the queue in the last moment."""
        async with self._around.fence.write() as session:
            row = await session.get(JobRow, self._job)
            if row is None or (row.state != JobState.QUEUED and row.state not in WITH_PROCESSES):
                return None
            if row.state == JobState.QUEUED:
                attempt = await self._new_attempt(session, row)
            else:
                attempt = await session.get_one(AttemptRow, (self._job, row.attempt))
            self._number, self._mark = attempt.number, attempt.mark
            self._resumes = spec_of(row).retries.resume_from_checkpoint
            order = self._order(row, attempt)
        if attempt.pid is not None:
            logger.info("job %s, attempt %d: found again as process %d", self._job, self._number, attempt.pid)
            return ProcessIdentity(attempt.pid, attempt.process_start)
        root = await asyncio.to_thread(process_tree.find_root, self._mark)
        if root is None:
            root = await asyncio.to_thread(process_tree.launch, order, self._around.command(order))
        await self._keep(root)
        logger.info("job %s, attempt %d runs as process %d", self._job, self._number, root.pid)
        return root

    async def _new_attempt(self, session: AsyncSession, row: JobRow) -> AttemptRow:
        row.attempt += 1
        row.start_time = row.start_time or utc_now()
        attempt = AttemptRow(
            job=row.id, number=row.attempt, mark=secrets.token_hex(16), spool_offset=0, notes_json="", ending_json=""
        )
        session.add(attempt)
        await self._around.journal.move(session, row, JobState.STARTING)
        return attempt

    def _order(self, row: JobRow, attempt: AttemptRow) -> LaunchOrder:
        folder = self._folder
        return LaunchOrder(
            mark=attempt.mark,
            recipe=folder.recipe,
            folder=folder.path,
            attempt=attempt.number,
            num_processes=spec_of(row).num_processes,
            visible_devices=tuple(int(name.partition(":")[2]) for name in self._devices if ":" in name),
            log_file=folder.path / f"runner-{attempt.number}.log",
        )

    async def _keep(self, root: ProcessIdentity) -> None:
        """Store who the tree's first process is. Until then its mark finds it."""
        await asyncio.to_thread(self._around.ledger.hand_over, ledger_name(self._job), root)
        while True:
            try:
                async with self._around.fence.write() as session:
                    attempt = await session.get_one(AttemptRow, (self._job, self._number))
                    attempt.pid, attempt.process_start = root.pid, root.start
                return
            except _PASSING as error:
                await self._pass(error)

    # While it runs

    async def _take_events(self) -> Taken:
        try:
            return await self._around.intake.take(self._job, self._number, self._folder)
        except _PASSING as error:
            await self._pass(error)
            return Taken.SOMETHING

    async def _pass(self, error: Exception) -> None:
        logger.warning("job %s waits for the database: %s", self._job, error)
        await asyncio.sleep(1.0)

    async def _deadline_s(self) -> float | None:
        """When the attempt has run for as long as it may, on the monotonic clock."""
        async with self._around.fence.write() as session:
            row = await session.get_one(JobRow, self._job)
            attempt = await session.get_one(AttemptRow, (self._job, self._number))
        allowed_s = spec_of(row).retries.max_attempt_s
        if allowed_s is None:
            return None
        behind_s = max(0.0, (utc_now() - attempt.create_time).total_seconds())
        return time.monotonic() + allowed_s - behind_s

    async def _ordered_grace_s(self, deadline_s: float | None) -> float | None:
        """How long the processes may take to end, if they are to end now."""
        if deadline_s is not None and time.monotonic() > deadline_s:
            self._is_overdue = True
            return PAUSE_GRACE_S
        if not self._bell.is_set():
            return None
        self._bell.clear()
        try:
            async with self._around.fence.write() as session:
                row = await session.get_one(JobRow, self._job)
        except _PASSING as error:
            self._bell.set()
            await self._pass(error)
            return None
        return {Order.CANCEL: float(row.wish_grace_s), Order.PAUSE: PAUSE_GRACE_S}.get(Order(row.wish))

    # Afterwards

    async def _conclude(self) -> float | None:
        await asyncio.to_thread(self._around.ledger.release, ledger_name(self._job))
        result, damage = await asyncio.to_thread(_result, self._folder)
        while True:
            try:
                async with self._around.fence.write() as session:
                    row = await session.get_one(JobRow, self._job)
                    attempt = await session.get_one(AttemptRow, (self._job, self._number))
                    attempt.end_time = utc_now()
                    return await self._move_on(session, row, attempt, result, damage)
            except _PASSING as error:
                await self._pass(error)

    async def _move_on(
        self,
        session: AsyncSession,
        row: JobRow,
        attempt: AttemptRow,
        result: TrainingResult | None,
        damage: Problem | None,
    ) -> float | None:
        journal = self._around.journal
        if row.wish == Order.CANCEL:
            await journal.move(session, row, JobState.CANCELLED)
        elif result is not None and result.recipe_digest == plan_of(row).recipe_digest:
            row.outcome_json = as_json(_outcome(result, await self._run_s(session)))
            is_published = spec_of(row).publication is not None
            await journal.move(session, row, JobState.PUBLISHING if is_published else JobState.SUCCEEDED)
        elif row.wish == Order.PAUSE:
            await journal.move(session, row, JobState.PAUSED)
        else:
            return await self._fail(session, row, damage or self._problem(attempt))
        return None

    def _problem(self, attempt: AttemptRow) -> Problem:
        if self._is_overdue:
            message = "the attempt ran for longer than retry_policy.max_attempt_duration"
            return Problem(reason=DeadlineExceeded.reason, message=message)
        match ending_of(attempt):
            case spool.Failed(reason=reason, message=message):
                return Problem(reason=reason, message=message)
            case spool.Stopped():
                return Problem(
                    reason=WorkerDied.reason, message="the training processes were told to end by somebody else"
                )
            case _:
                return Problem(reason=WorkerDied.reason, message="the training processes died without a word")

    async def _fail(self, session: AsyncSession, row: JobRow, problem: Problem) -> float | None:
        journal = self._around.journal
        wait_s = retry_after(spec_of(row).retries, row.num_retries, problem)
        retry_time_s = None if wait_s is None else time.time() + wait_s
        failed = AttemptFailed(problem=problem, retry_time_s=retry_time_s)
        await journal.tell(session, row, [JobEvent(job=row.id, attempt=row.attempt, body=failed)])
        logger.warning("job %s, attempt %d failed: %s: %s", row.id, row.attempt, problem.reason, problem.message)
        if wait_s is None:
            await journal.move(session, row, JobState.FAILED, problem=problem)
        else:
            row.num_retries += 1
            await journal.move(session, row, JobState.QUEUED, f"attempt {row.attempt} failed and is tried again")
        return wait_s

    async def _run_s(self, session: AsyncSession) -> float:
        """Seconds that all attempts ran, together."""
        attempts = await session.scalars(select(AttemptRow).where(AttemptRow.job == self._job))
        return sum(max(0.0, (each.end_time - each.create_time).total_seconds()) for each in attempts if each.end_time)


def ledger_name(job: str) -> str:
    return f"training/{job}"


async def _rung(bell: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await bell.wait()
    except TimeoutError:
        pass


def _result(folder: JobFolder) -> tuple[TrainingResult | None, Problem | None]:
    try:
        return read_result(folder.result), None
    except CorruptArtifact as error:
        return None, Problem(reason=error.reason, message=error.message)


def _outcome(result: TrainingResult, run_s: float) -> Outcome:
    before, after = result.eval_loss_before, result.eval_loss_after
    return Outcome(
        step=result.steps,
        metrics={} if after is None else {"eval_loss": after},
        baseline_metrics={} if before is None else {"eval_loss": before},
        train_loss=result.train_loss,
        num_tokens=result.num_tokens,
        run_s=run_s,
        num_train_rows=result.num_train_examples,
        num_evaluation_rows=result.num_held_out_examples,
        num_truncated_rows=result.num_truncated_examples,
        num_trainable_parameters=result.num_trainable_parameters,
        package_versions=result.versions,
    )
