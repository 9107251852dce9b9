"""Training jobs: ``client.jobs``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Unpack

from slipstream.training.v1 import training_service_pb2 as training_pb2
from slipstream.training.v1 import training_service_pb2_grpc
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.errors import DeadlineExceededError, InvalidRequestError, ProtocolError, SlipstreamClientError
from slipstream_client.job_events import AliasOutcome, Checkpoint, JobEvent, TrainingProgress, job_event
from slipstream_client.options import CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import Failure, plain
from slipstream_client.retries import may_pass
from slipstream_client.spelling import message_of, number_of
from slipstream_client.training_options import CreateJobOptions, SpecOptions

SERVICE = "training"
FINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
# One stream of a watch; it is opened again from the last event as long as the job goes on.
STREAM_S = 86_400.0
RECONNECT_S = 0.5
MAX_RECONNECT_S = 5.0
SPEC_FIELDS = frozenset(SpecOptions.__annotations__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What came out of a job; figures of the last evaluation, and of the base before the first step."""

    adapter_version: str
    model: str
    alias: AliasOutcome | None
    metrics: Mapping[str, float]
    baseline_metrics: Mapping[str, float]
    train_loss: float | None
    step_count: int
    trained_token_count: int
    run_duration_s: float | None
    checkpoint: str
    dataset_digest: str
    base_model_revision: str
    train_row_count: int
    evaluation_row_count: int
    truncated_row_count: int
    trainable_parameter_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A job. ``state``: validating, queued, starting, running, paused, evaluating, publishing, succeeded, failed or
    cancelled. ``spec``, or ``evaluation_spec``, is what was asked for with every default filled in, under the
    contract's names.
    """

    name: str
    display_name: str
    state: str
    state_message: str
    spec: Mapping[str, Any] | None
    evaluation_spec: Mapping[str, Any] | None
    error: Failure | None
    progress: TrainingProgress | None
    result: TrainingResult | None
    attempt_count: int
    queue_position: int
    last_sequence: int
    labels: Mapping[str, str]
    owner: str
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    update_time: datetime | None
    etag: str

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def has_ended(self) -> bool:
        return self.state in FINAL_STATES


class Jobs:
    """Training jobs. Names are ids (``j1``) or resource names (``trainingJobs/j1``)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> training_service_pb2_grpc.TrainingServiceAsyncStub:
        """The raw stub."""
        return training_service_pb2_grpc.TrainingServiceStub(self._connection.channel(SERVICE))

    async def create(self, base_model: str, dataset: str, **options: Unpack[CreateJobOptions]) -> TrainingJob:
        """Check a training and queue it, as LoRA unless ``qlora`` or ``full`` is given.

        ``publish={"adapter": "support", "alias": "candidate"}`` registers the result. A repeat after a lost
        connection does not make a second job. Raises InvalidRequestError naming the field.
        """
        call, given = _split(options)
        request = training_pb2.CreateTrainingJobRequest(
            training_job_id=given.pop("job_id", None) or "",
            display_name=given.pop("display_name", None) or "",
            labels=given.pop("labels", None) or {},
            validate_only=given.pop("validate_only", None) or False,
            spec=training_spec(base_model, dataset, given),
        )
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return _job(await self._connection.unary(SERVICE, self.stub.CreateTrainingJob, request, **call))

    async def get(self, name: str, **call: Unpack[CallOptions]) -> TrainingJob:
        """One job. Raises NotFoundError."""
        request = training_pb2.GetTrainingJobRequest(name=name)
        return _job(await self._connection.unary(SERVICE, self.stub.GetTrainingJob, request, **call))

    async def list(
        self, *, states: Sequence[str] = (), limit: int | None = None, **call: Unpack[CallOptions]
    ) -> list[TrainingJob]:
        """Every job, newest first; with ``states`` only those in one of them."""
        kind = training_pb2.TrainingJob.State.DESCRIPTOR
        request = training_pb2.ListTrainingJobsRequest(states=[number_of(kind, "states", state) for state in states])
        return await all_pages(
            self._connection,
            SERVICE,
            self.stub.ListTrainingJobs,
            request,
            lambda page: map(_job, page.training_jobs),
            limit=limit,
            **call,
        )

    async def cancel(self, name: str, *, grace_s: float | None = None, **call: Unpack[CallOptions]) -> TrainingJob:
        """End a job for good, with its processes; ``grace_s`` is their time to end by themselves."""
        request = message_of(training_pb2.CancelTrainingJobRequest, "", {"name": name, "grace": grace_s})
        return _job(await self._connection.unary(SERVICE, self.stub.CancelTrainingJob, request, **call))

    async def delete(self, name: str, *, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Delete a job that has ended, its events and its checkpoints; what it published stays."""
        request = training_pb2.DeleteTrainingJobRequest(name=name, etag=etag)
        await self._connection.unary(SERVICE, self.stub.DeleteTrainingJob, request, **call)

    async def checkpoints(self, name: str, **call: Unpack[CallOptions]) -> Sequence[Checkpoint]:
        """The complete checkpoints of a job, newest first."""
        return await all_pages(
            self._connection,
            SERVICE,
            self.stub.ListCheckpoints,
            training_pb2.ListCheckpointsRequest(parent=name),
            lambda page: [plain(Checkpoint, checkpoint) for checkpoint in page.checkpoints],
            **call,
        )

    async def watch(
        self,
        name: str,
        *,
        after_sequence: int = 0,
        on_disconnect: Callable[[SlipstreamClientError], None] | None = None,
        **call: Unpack[CallOptions],
    ) -> AsyncGenerator[JobEvent]:
        """The job's events after ``after_sequence``, each once and in order, until it has ended.

        A lost connection is opened again from the last event for as long as that takes (or ``timeout_s``, where it is
        given); ``on_disconnect`` hears of each loss. Leaving it early ends the call on the server.
        """
        deadline_s = time.monotonic() + (call.get("timeout_s") or float("inf"))
        request_id = call.get("request_id")
        backoff_s = RECONNECT_S
        while True:
            try:
                async with aclosing(self._events(name, after_sequence, deadline_s, request_id)) as events:
                    async for event in events:
                        backoff_s = RECONNECT_S
                        after_sequence = event.sequence
                        yield event
                # A stream ends well after the job's last event; but also where a service that stops lets go of it.
                job = await self.get(name)
                if job.has_ended and job.last_sequence <= after_sequence:
                    return
            except SlipstreamClientError as error:
                if not may_be_resumed(error) or time.monotonic() + backoff_s > deadline_s:
                    raise
                if on_disconnect is not None:
                    on_disconnect(error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(MAX_RECONNECT_S, backoff_s * 2)

    async def _events(
        self, name: str, after_sequence: int, deadline_s: float, request_id: str | None
    ) -> AsyncGenerator[JobEvent]:
        """One stream of events, checked to be without gap."""
        responses = self._connection.stream(
            SERVICE,
            self.stub.WatchTrainingJob,
            training_pb2.WatchTrainingJobRequest(name=name, after_sequence=after_sequence),
            is_answer=_is_any,
            timeout_s=min(STREAM_S, max(0.001, deadline_s - time.monotonic())),
            request_id=request_id,
            idempotent=False,
        )
        try:
            async for response in responses:
                for event in map(job_event, response.events):
                    if event.sequence != after_sequence + 1:
                        raise ProtocolError(
                            f"{name}: event {event.sequence} came after {after_sequence}; numbers have no gaps"
                        )
                    after_sequence = event.sequence
                    yield event
        finally:
            await responses.aclose()


def may_be_resumed(error: SlipstreamClientError) -> bool:
    """Whether a watch that failed so may go on: nobody answers for now, this reader was too slow, a stream got old."""
    return may_pass(error) or error.reason == "SLOW_READER" or isinstance(error, DeadlineExceededError)


def training_spec(base_model: str, dataset: str, options: Mapping[str, Any]) -> training_pb2.TrainingJobSpec:
    """The specification with those options; unknown ones are a TypeError, bad values an InvalidRequestError."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := set(given) - SPEC_FIELDS:
        raise TypeError(f"create() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    methods = [name for name in ("lora", "qlora", "full") if name in given]
    if len(methods) > 1:
        raise InvalidRequestError.of("spec.method", f"{' and '.join(methods)} exclude each other")
    selection = {"dataset": dataset, **given.pop("selection", {})}
    method: dict[str, Any] = {} if methods else {"lora": {}}
    return message_of(
        training_pb2.TrainingJobSpec, "spec", {"base_model": base_model, "dataset": selection} | method | given
    )


def _split(options: Any) -> tuple[CallOptions, dict[str, Any]]:
    rest = dict(options)
    return CallOptions(timeout_s=rest.pop("timeout_s", None), request_id=rest.pop("request_id", None)), rest


def _is_any(response: training_pb2.WatchTrainingJobResponse) -> bool:
    return True


def _job(proto: training_pb2.TrainingJob) -> TrainingJob:
    return plain(TrainingJob, proto)
