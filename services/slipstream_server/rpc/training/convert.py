"""Jobs, checkpoints and their events as protobuf, and events as the bytes that the log keeps. Pure functions."""

from __future__ import annotations

import math
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream.type.v1 import precision_pb2
from slipstream_server import errors
from slipstream_server.resource_names import CheckpointName, TrainingJobName
from slipstream_server.rpc.status import status_of
from slipstream_server.rpc.training.enums import DATA_TYPES, JOB_STATES, LOG_LEVELS
from slipstream_server.rpc.training.specs import duration, spec_message
from slipstream_server.storage.event_log import StoredEvent
from slipstream_server.training.estimation import Estimate
from slipstream_server.training.journal import (
    AttemptFailed,
    AttemptStarted,
    Body,
    CheckpointSaved,
    EvaluationCompleted,
    JobEvent,
    LogLine,
    MetricsLogged,
    ResultPublished,
    StateChanged,
)
from slipstream_server.training.resources import AliasOutcome, Checkpoint, Job, Outcome, Problem, Progress
from slipstream_server.training.states import JobState

_LONGEST_S = 10 * 365 * 86_400.0


def job_message(job: Job) -> pb2.TrainingJob:
    """A job; one without an id was only checked and has no name."""
    message = pb2.TrainingJob(
        name=str(TrainingJobName(job.id)) if job.id else "",
        display_name=job.display_name,
        state=JOB_STATES[job.state],
        state_message=job.state_message,
        spec=spec_message(job.spec),
        attempt_count=job.num_attempts,
        queue_position=job.queue_position,
        last_sequence=job.last_sequence,
        labels=job.labels,
        owner=job.owner,
        create_time=timestamp(job.create_time),
        update_time=timestamp(job.update_time),
        etag=job.etag,
    )
    if job.start_time is not None:
        message.start_time.CopyFrom(timestamp(job.start_time))
    if job.end_time is not None:
        message.end_time.CopyFrom(timestamp(job.end_time))
    if job.problem is not None:
        message.error.CopyFrom(problem_status(job.problem))
    if job.progress is not None:
        message.progress.CopyFrom(progress_message(job.progress))
    if job.state is JobState.SUCCEEDED and job.outcome is not None:
        message.result.CopyFrom(_result_message(job, job.outcome))
    return message


def checkpoint_message(checkpoint: Checkpoint) -> pb2.Checkpoint:
    return pb2.Checkpoint(
        name=str(CheckpointName(checkpoint.job, str(checkpoint.step))),
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        metrics=checkpoint.metrics,
        size_bytes=checkpoint.size_bytes,
        create_time=timestamp(checkpoint.create_time),
    )


def progress_message(progress: Progress) -> pb2.TrainingProgress:
    message = pb2.TrainingProgress(
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        loss=progress.loss,
        learning_rate=progress.learning_rate,
        trained_token_count=progress.num_trained_tokens,
        tokens_per_second=progress.tokens_per_second,
    )
    if progress.remaining_s is not None and 0 <= progress.remaining_s <= _LONGEST_S:
        message.remaining_duration.CopyFrom(duration(progress.remaining_s))
    return message


def estimate_message(estimate: Estimate) -> pb2.EstimateTrainingJobResponse:
    memory = estimate.memory
    return pb2.EstimateTrainingJobResponse(
        memory=pb2.MemoryEstimate(
            weights_bytes=memory.weights,
            gradient_bytes=memory.gradients,
            optimizer_bytes=memory.optimizer,
            activation_bytes=memory.activations,
            overhead_bytes=memory.overhead,
            total_bytes=memory.total,
        ),
        available_memory_bytes=estimate.available_bytes,
        fits=estimate.fits,
        total_steps=estimate.total_steps,
        epoch_token_count=estimate.epoch_tokens,
        parameter_count=memory.num_parameters,
        trainable_parameter_count=memory.num_trainable_parameters,
        spec=spec_message(estimate.spec),
    )


def encode_event(event: JobEvent) -> bytes:
    """``event`` without its number, which the event log knows."""
    message = pb2.TrainingJobEvent(attempt=event.attempt)
    message.time.FromNanoseconds(int(event.time_s * 1e9))
    _set_body(message, event.job, event.body)
    return message.SerializeToString()


def event_message(stored: StoredEvent) -> pb2.TrainingJobEvent:
    message = pb2.TrainingJobEvent.FromString(stored.payload)
    message.sequence = stored.sequence
    return message


def problem_status(problem: Problem) -> status_pb2.Status:
    """As a call would answer it: code and ErrorInfo of the error of that reason."""
    error = _class_of(problem.reason)(problem.message, metadata=problem.metadata)
    return status_of(error)


def timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def _set_body(message: pb2.TrainingJobEvent, job: str, body: Body) -> None:
    match body:
        case StateChanged():
            message.state_changed.CopyFrom(_state_changed(body))
        case Progress():
            message.progress.CopyFrom(progress_message(body))
        case MetricsLogged():
            message.metrics_logged.CopyFrom(_metrics_logged(body))
        case EvaluationCompleted():
            message.evaluation_completed.step = body.step
            message.evaluation_completed.epoch = body.epoch
            message.evaluation_completed.metrics.update(body.metrics)
            message.evaluation_completed.row_count = body.num_rows
        case CheckpointSaved():
            message.checkpoint_saved.checkpoint.CopyFrom(checkpoint_message(body.checkpoint))
            deleted = [str(CheckpointName(job, str(step))) for step in body.deleted_steps]
            message.checkpoint_saved.deleted_checkpoints.extend(deleted)
        case LogLine():
            message.log_line.level = LOG_LEVELS.get(body.level, pb2.LOG_LEVEL_UNSPECIFIED)
            message.log_line.message = body.message
        case ResultPublished():
            message.result_published.adapter_version = body.version
            message.result_published.digest = body.digest
        case AliasOutcome():
            message.alias_outcome.CopyFrom(_alias_outcome(body))
        case AttemptStarted():
            message.attempt_started.CopyFrom(_attempt_started(body))
        case AttemptFailed():
            message.attempt_failed.error.CopyFrom(problem_status(body.problem))
            message.attempt_failed.will_retry = body.retry_time_s is not None
            if body.retry_time_s is not None:
                message.attempt_failed.retry_time.FromNanoseconds(int(body.retry_time_s * 1e9))


def _state_changed(body: StateChanged) -> pb2.StateChanged:
    return pb2.StateChanged(
        previous_state=pb2.TrainingJob.STATE_UNSPECIFIED if body.previous is None else JOB_STATES[body.previous],
        state=JOB_STATES[body.state],
        state_message=body.message,
        error=None if body.problem is None else problem_status(body.problem),
    )


def _metrics_logged(body: MetricsLogged) -> pb2.MetricsLogged:
    return pb2.MetricsLogged(
        step=body.step,
        epoch=body.epoch,
        loss=body.loss,
        learning_rate=body.learning_rate,
        gradient_norm=body.gradient_norm,
        tokens_per_second=body.tokens_per_second,
    )


def _attempt_started(body: AttemptStarted) -> pb2.AttemptStarted:
    is_cpu = body.device == "cpu"
    devices = ["cpu"] if is_cpu else [f"{body.device}:{rank}" for rank in range(body.num_processes)]
    return pb2.AttemptStarted(
        resumed_step=body.resumed_step,
        process_count=body.num_processes,
        devices=devices,
        trainable_parameter_count=body.num_trainable_parameters,
        total_steps=body.total_steps,
        train_row_count=body.num_train_rows,
        evaluation_row_count=body.num_evaluation_rows,
        data_type=DATA_TYPES.get(body.precision, precision_pb2.DATA_TYPE_UNSPECIFIED),
    )


def _alias_outcome(outcome: AliasOutcome) -> pb2.AliasOutcome:
    return pb2.AliasOutcome(
        alias=outcome.alias,
        moved=outcome.moved,
        generation=outcome.generation,
        error=None if outcome.problem is None else problem_status(outcome.problem),
    )


def _result_message(job: Job, outcome: Outcome) -> pb2.TrainingResult:
    plan = job.plan
    return pb2.TrainingResult(
        adapter_version=outcome.version,
        alias=None if outcome.alias is None else _alias_outcome(outcome.alias),
        metrics=with_perplexity(outcome.metrics),
        baseline_metrics=with_perplexity(outcome.baseline_metrics),
        train_loss=outcome.train_loss,
        step_count=outcome.step,
        trained_token_count=outcome.num_tokens,
        run_duration=duration(outcome.run_s),
        checkpoint=str(CheckpointName(job.id, str(outcome.step))),
        dataset_digest=f"sha256:{plan.dataset_digest}" if plan else "",
        base_model_revision=plan.base_model_revision if plan else "",
        train_row_count=outcome.num_train_rows,
        evaluation_row_count=outcome.num_evaluation_rows,
        truncated_row_count=outcome.num_truncated_rows,
        trainable_parameter_count=outcome.num_trainable_parameters,
    )


def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    """``metrics`` and, where the loss is not out of all measure, its exponential."""
    loss = metrics.get("eval_loss")
    return metrics if loss is None or loss > 700 else {**metrics, "perplexity": math.exp(loss)}


def _class_of(reason: str) -> type[errors.SlipstreamError]:
    """The most particular class of ``reason``."""
    found = [cls for cls in _classes(errors.SlipstreamError) if cls.reason == reason]
    return found[-1] if found else errors.InternalError


def _classes(cls: type[errors.SlipstreamError]) -> list[type[errors.SlipstreamError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _classes(child))]
