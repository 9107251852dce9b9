"""What happens to jobs, as events in the transaction that makes it happen, and the only way a job changes its state.

Payloads are written by the layer above (``Encode``). Event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.storage.columns import utc_now
from slipstream_server.training.resources import AliasOutcome, Checkpoint, Problem, Progress, as_json
from slipstream_server.training.states import ENDED, WITH_PROCESSES, JobState, Order, check_next
from slipstream_server.training.tables import EVENTS, JobRow


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """``previous`` is None in a job's first event."""

    previous: JobState | None
    state: JobState
    message: str = ""
    problem: Problem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLogged:
    step: int
    epoch: float
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCompleted:
    step: int
    epoch: float
    metrics: dict[str, float]
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    checkpoint: Checkpoint
    deleted_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    level: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    resumed_step: int
    num_processes: int
    device: str
    num_trainable_parameters: int
    total_steps: int
    num_train_rows: int
    num_evaluation_rows: int
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """``retry_time_s`` is Unix time; None: there is no further attempt."""

    problem: Problem
    retry_time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPublished:
    version: str
    digest: str


Body = (
    StateChanged
    | Progress
    | MetricsLogged
    | EvaluationCompleted
    | CheckpointSaved
    | LogLine
    | AttemptStarted
    | AttemptFailed
    | ResultPublished
    | AliasOutcome
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to ``job``. ``time_s`` is Unix time, by the clock of where it happened."""

    job: str
    attempt: int
    body: Body
    time_s: float = field(default_factory=time.time)


Encode = Callable[[JobEvent], bytes]


class Journal:
    """Writes events, and states with them."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    async def tell(self, session: AsyncSession, row: JobRow, events: Iterable[JobEvent]) -> None:
        """Append ``events`` to the job's stream."""
        numbers = await EVENTS.append(session, row.id, [self._encode(event) for event in events])
        if numbers:
            row.last_sequence = numbers[-1]

    async def begin(self, session: AsyncSession, row: JobRow) -> None:
        """The first event of a job that was just added."""
        changed = StateChanged(previous=None, state=JobState(row.state))
        await self.tell(session, row, [JobEvent(job=row.id, attempt=0, body=changed)])

    async def move(
        self,
        session: AsyncSession,
        row: JobRow,
        state: JobState,
        message: str = "",
        problem: Problem | None = None,
        *,
        time_s: float | None = None,
    ) -> None:
        """Bring the job into ``state``; raises WrongState where that may not follow."""
        previous = JobState(row.state)
        check_next(previous, state)
        row.state, row.state_message = state, message
        row.error_json = as_json(problem) if problem else ""
        row.update_time = utc_now()
        row.end_time = row.update_time if state in ENDED else None
        row.generation += 1
        if state not in WITH_PROCESSES:
            row.wish = Order.NONE
        changed = StateChanged(previous=previous, state=state, message=message, problem=problem)
        event = JobEvent(job=row.id, attempt=row.attempt, body=changed, time_s=time_s or time.time())
        await self.tell(session, row, [event])

    def explain(self, row: JobRow, message: str) -> None:
        """Another sentence about the same state; no event."""
        if row.state_message != message:
            row.state_message = message
            row.generation += 1
