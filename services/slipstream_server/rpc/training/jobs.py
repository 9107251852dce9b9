"""TrainingService: converts, asks the rooms, converts back. Event loop; no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream.training.v1 import training_service_pb2_grpc as training_grpc
from slipstream_server.errors import InvalidField, Unimplemented
from slipstream_server.rpc.request_context import caller, remaining_s
from slipstream_server.rpc.training import convert, requests
from slipstream_server.rpc.training.specs import spec_message, spec_of
from slipstream_server.storage.device_ledger import DeviceLedger
from slipstream_server.training.checking import Checking
from slipstream_server.training.estimation import estimate
from slipstream_server.training.jobs import Jobs
from slipstream_server.training.resources import Job
from slipstream_server.training.specification import check_spec
from slipstream_server.training.states import ENDED
from slipstream_server.training.supervisor import Supervisor
from slipstream_server.training.validation import Validation

Context = grpc.aio.ServicerContext[Any, Any]

# Beyond the grace: killing, and writing down how it ended.
_CANCEL_SLACK_S = 30.0
_ANSWER_BEFORE_DEADLINE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRooms:
    """The rooms behind the service."""

    jobs: Jobs
    validation: Validation
    checking: Checking
    supervisor: Supervisor
    ledger: DeviceLedger
    capacity_bytes: Mapping[str, int]


class TrainingServicer(training_grpc.TrainingServiceServicer):
    """Every method of the contract but EvaluateModel."""

    def __init__(self, rooms: JobRooms) -> None:
        self._rooms = rooms

    async def CreateTrainingJob(self, request: pb2.CreateTrainingJobRequest, context: Context) -> pb2.TrainingJob:
        details = requests.job_details(request)
        key = requests.request_key("CreateTrainingJob", request.request_id, request)
        if not request.HasField("spec"):
            raise InvalidField.of("spec", "is required")
        if key is not None and not request.validate_only and (known := await self._rooms.jobs.repeated(key)):
            return convert.job_message(known)
        await self._rooms.jobs.check_new(details.id)
        spec = spec_of(request.spec)
        if request.validate_only:
            checked = await self._rooms.validation.fully(caller(), spec, None)
            return pb2.TrainingJob(
                display_name=details.display_name,
                state=pb2.TrainingJob.STATE_VALIDATING,
                spec=spec_message(checked.spec),
                labels=details.labels,
            )
        spec = await self._rooms.validation.quickly(caller(), spec)
        job = await self._rooms.jobs.add(caller(), details, spec, key=key)
        self._rooms.checking.ring()
        return convert.job_message(job)

    async def GetTrainingJob(self, request: pb2.GetTrainingJobRequest, context: Context) -> pb2.TrainingJob:
        return convert.job_message(await self._rooms.jobs.get(caller(), requests.job_id(request.name)))

    async def ListTrainingJobs(
        self, request: pb2.ListTrainingJobsRequest, context: Context
    ) -> pb2.ListTrainingJobsResponse:
        states = requests.job_states(request)
        page = await self._rooms.jobs.list(caller(), states, request.page_size, request.page_token)
        return pb2.ListTrainingJobsResponse(
            training_jobs=[convert.job_message(job) for job in page.items], next_page_token=page.next_page_token
        )

    async def DeleteTrainingJob(self, request: pb2.DeleteTrainingJobRequest, context: Context) -> Empty:
        await self._rooms.jobs.delete(caller(), requests.job_id(request.name), request.etag)
        return Empty()

    async def CancelTrainingJob(self, request: pb2.CancelTrainingJobRequest, context: Context) -> pb2.TrainingJob:
        job_id, grace_s = requests.job_id(request.name), requests.grace_s(request)
        job = await self._rooms.jobs.cancel(caller(), job_id, grace_s)
        self._rooms.supervisor.ring(job_id)
        if job.state not in ENDED:
            job = await self._wait_until_ended(job_id, grace_s + _CANCEL_SLACK_S)
        return convert.job_message(job)

    async def PauseTrainingJob(self, request: pb2.PauseTrainingJobRequest, context: Context) -> pb2.TrainingJob:
        job_id = requests.job_id(request.name)
        job = await self._rooms.jobs.pause(caller(), job_id)
        self._rooms.supervisor.ring(job_id)
        return convert.job_message(job)

    async def ResumeTrainingJob(self, request: pb2.ResumeTrainingJobRequest, context: Context) -> pb2.TrainingJob:
        job_id = requests.job_id(request.name)
        job = await self._rooms.jobs.resume(caller(), job_id, requests.checkpoint_step(request, job_id))
        self._rooms.supervisor.forget_wait(job_id)
        self._rooms.supervisor.ring()
        return convert.job_message(job)

    async def WatchTrainingJob(
        self, request: pb2.WatchTrainingJobRequest, context: Context
    ) -> AsyncIterator[pb2.WatchTrainingJobResponse]:
        watch = self._rooms.jobs.watch(caller(), requests.job_id(request.name), request.after_sequence)
        async with aclosing(watch) as batches:
            async for batch in batches:
                yield pb2.WatchTrainingJobResponse(events=[convert.event_message(stored) for stored in batch])

    async def ListCheckpoints(
        self, request: pb2.ListCheckpointsRequest, context: Context
    ) -> pb2.ListCheckpointsResponse:
        job_id = requests.job_id(request.parent, "parent")
        page = await self._rooms.jobs.checkpoints(caller(), job_id, request.page_size, request.page_token)
        return pb2.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint_message(checkpoint) for checkpoint in page.items],
            next_page_token=page.next_page_token,
        )

    async def EstimateTrainingJob(
        self, request: pb2.EstimateTrainingJobRequest, context: Context
    ) -> pb2.EstimateTrainingJobResponse:
        spec = spec_of(request.spec, needs_dataset=False)
        check_spec(spec)
        if spec.dataset:
            checked = await self._rooms.validation.fully(caller(), spec, None, must_fit=False)
        else:
            checked = await self._rooms.validation.with_model(spec, must_fit=False)
        found = await asyncio.to_thread(estimate, checked, self._rooms.ledger, self._rooms.capacity_bytes)
        return convert.estimate_message(found)

    async def EvaluateModel(self, request: pb2.EvaluateModelRequest, context: Context) -> pb2.TrainingJob:
        raise Unimplemented("EvaluateModel is part of the contract, but not built yet")

    async def _wait_until_ended(self, job_id: str, timeout_s: float) -> Job:
        """The job when it has ended, or as it is when the time or the call's deadline is over."""
        left_s = remaining_s()
        if left_s is not None:
            timeout_s = min(timeout_s, max(0.0, left_s - _ANSWER_BEFORE_DEADLINE_S))
        job = await self._rooms.jobs.get(caller(), job_id)
        try:
            async with asyncio.timeout(timeout_s):
                async with aclosing(self._rooms.jobs.watch(caller(), job_id, job.last_sequence)) as batches:
                    async for _ in batches:
                        pass
        except TimeoutError:
            pass
        return await self._rooms.jobs.get(caller(), job_id)
