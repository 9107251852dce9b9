"""What happens to a training job, as dataclasses.

``kind`` of an event is the contract's name of it (``metrics_logged``), and says the class of its ``payload``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from slipstream.training.v1 import training_service_pb2 as training_pb2
from slipstream_client.plain import Failure, plain


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """How far a job has come; what is None is not known yet. ``total_steps`` 0: unknown."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    trained_token_count: int
    tokens_per_second: float | None
    remaining_duration_s: float | None
    evaluated_row_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The job entered another state. ``error`` only where that is ``failed``."""

    previous_state: str
    state: str
    state_message: str
    error: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLogged:
    """Figures of training steps; ``loss`` in nats, None where it was not finite."""

    step: int
    epoch: float
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationStarted:
    """An evaluation began; step 0 is the base before the first step."""

    step: int
    row_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCompleted:
    """An evaluation ended. ``metrics`` has ``eval_loss`` for trainings."""

    step: int
    epoch: float
    metrics: Mapping[str, float]
    row_count: int
    duration_s: float | None
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A stored state of a training from which it can go on."""

    name: str
    step: int
    epoch: float
    metrics: Mapping[str, float]
    size_bytes: int
    best: bool
    create_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is complete."""

    checkpoint: Checkpoint | None
    deleted_checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line of the job's log. ``level`` is empty for what the job's libraries wrote."""

    level: str
    message: str
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPublished:
    """A version, or a model, was registered."""

    adapter_version: str
    model: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasOutcome:
    """What became of the alias that a job asked for; ``error`` says why it was not moved."""

    alias: str
    moved: bool
    generation: int
    error: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    """An attempt began, from ``resumed_step`` on."""

    resumed_step: int
    process_count: int
    devices: tuple[str, ...]
    trainable_parameter_count: int
    parameter_count: int
    total_steps: int
    train_row_count: int
    evaluation_row_count: int
    data_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """An attempt ended without a result."""

    error: Failure | None
    will_retry: bool
    retry_time: datetime | None


Payload = (
    StateChanged
    | TrainingProgress
    | MetricsLogged
    | EvaluationStarted
    | EvaluationCompleted
    | CheckpointSaved
    | LogLine
    | ResultPublished
    | AliasOutcome
    | AttemptStarted
    | AttemptFailed
)
PAYLOADS: Mapping[str, type[Payload]] = {
    "state_changed": StateChanged,
    "progress": TrainingProgress,
    "metrics_logged": MetricsLogged,
    "evaluation_started": EvaluationStarted,
    "evaluation_completed": EvaluationCompleted,
    "checkpoint_saved": CheckpointSaved,
    "log_line": LogLine,
    "result_published": ResultPublished,
    "alias_outcome": AliasOutcome,
    "attempt_started": AttemptStarted,
    "attempt_failed": AttemptFailed,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job. ``sequence`` counts from 1, without gaps, over all attempts.

    ``payload`` is None, and ``kind`` empty, for an event newer than this client.
    """

    sequence: int
    attempt: int
    time: datetime
    kind: str
    payload: Payload | None


def job_event(proto: training_pb2.TrainingJobEvent) -> JobEvent:
    """The result for an event."""
    kind = proto.WhichOneof("event") or ""
    known = PAYLOADS.get(kind)
    return JobEvent(
        sequence=proto.sequence,
        attempt=proto.attempt,
        time=proto.time.ToDatetime(tzinfo=UTC),
        kind=kind,
        payload=plain(known, getattr(proto, kind)) if known is not None else None,
    )
