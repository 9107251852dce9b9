"""Takes what a runner has written into its spool: numbers it, stores it, and moves the job along.

The events, what they change, and the byte up to which the spool was read are one transaction, so that nothing is lost
or told twice whenever the service dies. Event loop; the file is read in a thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.training import events as spool
from slipstream_server.training.fence import Fence
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.journal import (
    AttemptStarted,
    Body,
    CheckpointSaved,
    EvaluationCompleted,
    JobEvent,
    Journal,
    LogLine,
    MetricsLogged,
)
from slipstream_server.training.resources import Progress, as_json, checkpoint_of, progress_of, spec_of
from slipstream_server.training.spool import read_spool
from slipstream_server.training.states import JobState
from slipstream_server.training.tables import AttemptRow, CheckpointRow, JobRow

logger = logging.getLogger(__name__)

_BETWEEN_PROGRESS_S = 1.0
Ending = spool.Stopped | spool.Finished | spool.Failed


class Taken(Enum):
    """What a look into the spool brought; ``THE_LAST``: the runner has written its result and only has to end."""

    NOTHING = 0
    SOMETHING = 1
    THE_LAST = 2


class Notes(msgspec.Struct, kw_only=True):
    """What has to be known of an attempt's earlier events to understand the next one."""

    total_steps: int = 0
    num_held_out: int = 0
    evaluated_step: int = -1
    evaluation: dict[str, float] = {}
    last_progress_s: float = 0.0


class SpoolIntake:
    """Follows the spools of one service's attempts."""

    def __init__(self, fence: Fence, journal: Journal) -> None:
        self._fence = fence
        self._journal = journal
        # What stands in the database, so that a file that has not grown costs no question.
        self._offsets: dict[tuple[str, int], int] = {}

    async def take(self, job: str, number: int, folder: JobFolder) -> Taken:
        """Store what is new. Raises StorageFull, DependencyUnavailable, having taken nothing."""
        path = folder.events(number)
        if _size(path) <= self._offsets.get((job, number), 0):
            return Taken.NOTHING
        async with self._fence.write() as session:
            offset = (await session.get_one(AttemptRow, (job, number))).spool_offset
        batch = await asyncio.to_thread(read_spool, path, offset)
        if batch.next_offset == offset:
            self._offsets[job, number] = offset
            return Taken.NOTHING
        if batch.num_malformed:
            logger.warning("%d lines of job %s, attempt %d, are no events", batch.num_malformed, job, number)
        async with self._fence.write() as session:
            attempt = await session.get_one(AttemptRow, (job, number))
            row = await session.get_one(JobRow, job)
            reading = _Reading(self._journal, session, row, attempt)
            for event in batch.events:
                await reading.take(event)
            attempt.spool_offset = batch.next_offset
            attempt.notes_json = as_json(reading.notes)
        self._offsets[job, number] = batch.next_offset
        is_finished = any(isinstance(event, spool.Finished) for event in batch.events)
        return Taken.THE_LAST if is_finished else Taken.SOMETHING


def ending_of(attempt: AttemptRow) -> Ending | None:
    """How the attempt's runner said that it ended; None where it did not come to that."""
    return msgspec.json.decode(attempt.ending_json, type=Ending) if attempt.ending_json else None


class _Reading:
    """Applies the events of one batch, in their order."""

    def __init__(self, journal: Journal, session: AsyncSession, row: JobRow, attempt: AttemptRow) -> None:
        self._journal, self._session, self._row, self._attempt = journal, session, row, attempt
        text = attempt.notes_json
        self.notes = msgspec.json.decode(text, type=Notes) if text else Notes()

    async def take(self, event: spool.AnyEvent) -> None:
        match event:
            case spool.Started():
                await self._started(event)
            case spool.Progress():
                await self._progressed(event)
            case spool.Evaluation():
                await self._evaluated(event)
            case spool.Checkpoint():
                await self._saved(event)
            case spool.Log():
                await self._tell(event, LogLine(level=event.level, message=event.message))
            case spool.Stopped() | spool.Finished() | spool.Failed():
                # The first failure of several processes is the cause of the others.
                if not isinstance(event, spool.Failed) or not self._attempt.ending_json:
                    self._attempt.ending_json = as_json(event)

    async def _started(self, event: spool.Started) -> None:
        self.notes.total_steps, self.notes.num_held_out = event.total_steps, event.num_held_out_examples
        self._attempt.resumed_step = event.resumed_from_step
        await self._forget_checkpoints(event.resumed_from_step)
        if self._row.state == JobState.STARTING:
            await self._journal.move(self._session, self._row, JobState.RUNNING, time_s=event.time_s)
        self._keep(Progress(step=event.resumed_from_step, total_steps=event.total_steps))
        started = AttemptStarted(
            resumed_step=event.resumed_from_step,
            num_processes=event.world_size,
            device=event.device,
            num_trainable_parameters=event.num_trainable_parameters,
            total_steps=event.total_steps,
            num_train_rows=event.num_train_examples,
            num_evaluation_rows=event.num_held_out_examples,
            precision=event.precision,
        )
        await self._tell(event, started)

    async def _progressed(self, event: spool.Progress) -> None:
        logged = MetricsLogged(
            step=event.step,
            epoch=event.epoch,
            loss=event.loss,
            learning_rate=event.learning_rate,
            gradient_norm=event.grad_norm,
            tokens_per_second=event.tokens_per_second,
        )
        progress = Progress(
            step=event.step,
            total_steps=event.total_steps,
            epoch=event.epoch,
            loss=event.loss,
            learning_rate=event.learning_rate,
            num_trained_tokens=event.num_tokens,
            tokens_per_second=event.tokens_per_second,
            remaining_s=event.eta_s,
        )
        self._keep(progress)
        await self._tell(event, logged)
        if event.time_s - self.notes.last_progress_s >= _BETWEEN_PROGRESS_S:
            self.notes.last_progress_s = event.time_s
            await self._tell(event, progress)
        await self._perhaps_evaluating(event.step, event.time_s)

    async def _evaluated(self, event: spool.Evaluation) -> None:
        figures = {"eval_loss": event.eval_loss, "perplexity": event.perplexity}
        metrics = {name: value for name, value in figures.items() if value is not None}
        self.notes.evaluated_step, self.notes.evaluation = event.step, metrics
        epoch = self._progress().epoch if event.step else 0.0
        completed = EvaluationCompleted(step=event.step, epoch=epoch, metrics=metrics, num_rows=self.notes.num_held_out)
        await self._tell(event, completed)

    async def _saved(self, event: spool.Checkpoint) -> None:
        row = await self._session.get(CheckpointRow, (self._row.id, event.step))
        if row is None:
            row = CheckpointRow(job=self._row.id, step=event.step)
            self._session.add(row)
        progress = self._progress()
        row.size_bytes = event.size_bytes
        row.epoch = progress.epoch if progress.step == event.step else 0.0
        row.metrics_json = as_json(self.notes.evaluation if self.notes.evaluated_step == event.step else {})
        row.create_time = datetime.fromtimestamp(event.time_s, UTC)
        await self._session.flush()
        deleted = await self._drop_oldest(spec_of(self._row).hyperparameters.keep_checkpoints)
        await self._tell(event, CheckpointSaved(checkpoint=checkpoint_of(row), deleted_steps=tuple(deleted)))
        await self._perhaps_evaluating(event.step, event.time_s)

    async def _perhaps_evaluating(self, step: int, time_s: float) -> None:
        if self._row.state == JobState.RUNNING and step >= self.notes.total_steps and self.notes.num_held_out:
            await self._journal.move(self._session, self._row, JobState.EVALUATING, time_s=time_s)

    async def _drop_oldest(self, num_kept: int) -> Sequence[int]:
        """The runner keeps so many; what it removed is not told in its events."""
        steps = select(CheckpointRow.step).where(CheckpointRow.job == self._row.id)
        gone = list(await self._session.scalars(steps.order_by(CheckpointRow.step.desc()).offset(num_kept)))
        await self._delete_checkpoints(gone)
        return sorted(gone)

    async def _forget_checkpoints(self, after_step: int) -> None:
        """An attempt removes what is later than the step that it goes on from."""
        steps = select(CheckpointRow.step).where(CheckpointRow.job == self._row.id, CheckpointRow.step > after_step)
        await self._delete_checkpoints(list(await self._session.scalars(steps)))

    async def _delete_checkpoints(self, steps: Sequence[int]) -> None:
        if steps:
            doomed = delete(CheckpointRow).where(CheckpointRow.job == self._row.id, CheckpointRow.step.in_(steps))
            await self._session.execute(doomed)

    def _progress(self) -> Progress:
        return progress_of(self._row) or Progress()

    def _keep(self, progress: Progress) -> None:
        self._row.progress_json = as_json(progress)

    async def _tell(self, event: spool.AnyEvent, body: Body) -> None:
        told = JobEvent(job=self._row.id, attempt=self._attempt.number, body=body, time_s=event.time_s)
        await self._journal.tell(self._session, self._row, [told])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
