"""A training service over real gRPC that takes datasets, and plays the events of a job that a test wrote."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import empty_pb2, struct_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, status_pb2
from tests.unit.client.fake_services import Failure

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream.training.v1 import dataset_service_pb2_grpc, training_service_pb2_grpc
from slipstream.training.v1 import training_service_pb2 as training_pb2

Job = training_pb2.TrainingJob
FINAL = (Job.STATE_SUCCEEDED, Job.STATE_FAILED, Job.STATE_CANCELLED)


def event(sequence: int, **payload: Any) -> training_pb2.TrainingJobEvent:
    return training_pb2.TrainingJobEvent(
        sequence=sequence, attempt=1, time=Timestamp(seconds=1_700_000_000 + sequence), **payload
    )


def changed(state: Job.State.ValueType, **more: Any) -> dict[str, Any]:
    return {"state_changed": training_pb2.StateChanged(state=state, **more)}


def short_training(steps: int = 4) -> list[training_pb2.TrainingJobEvent]:
    """The events of a job to which nothing happens."""
    payloads: list[dict[str, Any]] = [
        changed(Job.STATE_VALIDATING),
        changed(Job.STATE_QUEUED, state_message="waiting for cpu"),
        changed(Job.STATE_STARTING),
        {"attempt_started": training_pb2.AttemptStarted(process_count=1, devices=["cpu"], total_steps=steps)},
        {"evaluation_started": training_pb2.EvaluationStarted(row_count=24)},
        {"evaluation_completed": training_pb2.EvaluationCompleted(metrics={"eval_loss": 3.0}, row_count=24)},
        changed(Job.STATE_RUNNING),
    ]
    for step in range(1, steps + 1):
        loss = 3.0 / step
        payloads += [
            {"progress": training_pb2.TrainingProgress(step=step, total_steps=steps, loss=loss)},
            {"metrics_logged": training_pb2.MetricsLogged(step=step, loss=loss, learning_rate=1e-3)},
        ]
    checkpoint = training_pb2.Checkpoint(name=f"trainingJobs/j1/checkpoints/{steps}", step=steps, size_bytes=2048)
    payloads += [
        {"log_line": training_pb2.LogLine(level=training_pb2.LOG_LEVEL_WARNING, message="a thing to know")},
        {"checkpoint_saved": training_pb2.CheckpointSaved(checkpoint=checkpoint)},
        changed(Job.STATE_EVALUATING),
        {
            "evaluation_completed": training_pb2.EvaluationCompleted(
                step=steps, metrics={"eval_loss": 1.5}, row_count=24, best=True
            )
        },
        changed(Job.STATE_PUBLISHING),
        {"result_published": training_pb2.ResultPublished(adapter_version="adapters/desk/versions/v1")},
        {"alias_outcome": training_pb2.AliasOutcome(alias="adapters/desk/aliases/live", moved=True, generation=1)},
        changed(Job.STATE_SUCCEEDED),
    ]
    return [event(place, **payload) for place, payload in enumerate(payloads, start=1)]


class FakeTraining(dataset_service_pb2_grpc.DatasetServiceServicer, training_service_pb2_grpc.TrainingServiceServicer):
    """One dataset and one job.

    ``failures`` are spent first, one for each call but watches; each of ``breaks`` ends one watch with UNAVAILABLE
    after so many events. ``released`` bounds the events that have happened so far.
    """

    def __init__(self) -> None:
        self.failures: deque[Failure] = deque()
        self.requests: list[tuple[str, Any]] = []
        self.uploads: list[dict[str, bytes]] = []
        self.dataset = dataset_pb2.Dataset(name="datasets/desk", state=dataset_pb2.Dataset.STATE_READY)
        self.looks_until_settled = 0
        self.preview = dataset_pb2.PreviewDatasetResponse()
        self.events = short_training()
        self.released: int | None = None
        self.news = asyncio.Event()
        self.breaks: deque[int] = deque()
        self.watches: list[int] = []
        self.cancelled = asyncio.Event()
        self.job = Job(name="trainingJobs/j1")

    def asked(self, method: str) -> list[Any]:
        """The requests of one method."""
        return [request for name, request in self.requests if name == method]

    async def _note(self, method: str, request: Any, context: Any) -> None:
        self.requests.append((method, request))
        if self.failures:
            await self.failures.popleft().abort(context)

    @property
    def happened(self) -> list[training_pb2.TrainingJobEvent]:
        return self.events if self.released is None else self.events[: self.released]

    def release(self, count: int | None) -> None:
        """Let so many events have happened."""
        self.released = count
        self.news.set()

    def _job_now(self) -> Job:
        job = Job()
        job.CopyFrom(self.job)
        for happened in self.happened:
            if happened.HasField("state_changed"):
                job.state = happened.state_changed.state
                job.error.CopyFrom(happened.state_changed.error)
        job.last_sequence = len(self.happened)
        if not job.HasField("error") or not job.error.message:
            job.ClearField("error")
        if job.state == Job.STATE_SUCCEEDED:
            job.result.CopyFrom(
                training_pb2.TrainingResult(
                    adapter_version="adapters/desk/versions/v1",
                    alias=training_pb2.AliasOutcome(alias="adapters/desk/aliases/live", moved=True, generation=1),
                    metrics={"eval_loss": 1.5},
                    baseline_metrics={"eval_loss": 3.0},
                    step_count=4,
                    train_row_count=170,
                )
            )
            job.result.run_duration.FromMilliseconds(72_500)
        return job

    async def UploadDataset(self, request_iterator: Any, context: Any) -> dataset_pb2.Dataset:
        header = (await anext(request_iterator)).header
        await self._note("UploadDataset", header, context)
        files = {file.file.path: b"" for file in header.files}
        paths = list(files)
        async for message in request_iterator:
            path = paths[message.chunk.file_index]
            assert message.chunk.offset_bytes == len(files[path])
            files[path] += message.chunk.data
        for file in header.files:
            if hashlib.sha256(files[file.file.path]).hexdigest() != file.file.sha256:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wrong hash")
        self.uploads.append(files)
        return dataset_pb2.Dataset(name=self.dataset.name, state=dataset_pb2.Dataset.STATE_VALIDATING)

    async def GetDataset(self, request: Any, context: Any) -> dataset_pb2.Dataset:
        await self._note("GetDataset", request, context)
        if self.looks_until_settled:
            self.looks_until_settled -= 1
            return dataset_pb2.Dataset(name=self.dataset.name, state=dataset_pb2.Dataset.STATE_VALIDATING)
        return self.dataset

    async def ListDatasets(self, request: Any, context: Any) -> dataset_pb2.ListDatasetsResponse:
        """Pages of one: page n has the dataset ``desk-n``, and there are three."""
        await self._note("ListDatasets", request, context)
        place = int(request.page_token or 1)
        listed = dataset_pb2.Dataset(name=f"datasets/desk-{place}", state=self.dataset.state)
        return dataset_pb2.ListDatasetsResponse(datasets=[listed], next_page_token=str(place + 1) if place < 3 else "")

    async def DeleteDataset(self, request: Any, context: Any) -> empty_pb2.Empty:
        await self._note("DeleteDataset", request, context)
        return empty_pb2.Empty()

    async def PreviewDataset(self, request: Any, context: Any) -> dataset_pb2.PreviewDatasetResponse:
        await self._note("PreviewDataset", request, context)
        return self.preview

    async def CreateTrainingJob(self, request: Any, context: Any) -> Job:
        await self._note("CreateTrainingJob", request, context)
        self.job.spec.CopyFrom(request.spec)
        return self._job_now()

    async def GetTrainingJob(self, request: Any, context: Any) -> Job:
        await self._note("GetTrainingJob", request, context)
        return self._job_now()

    async def ListTrainingJobs(self, request: Any, context: Any) -> training_pb2.ListTrainingJobsResponse:
        await self._note("ListTrainingJobs", request, context)
        return training_pb2.ListTrainingJobsResponse(training_jobs=[self._job_now()])

    async def CancelTrainingJob(self, request: Any, context: Any) -> Job:
        await self._note("CancelTrainingJob", request, context)
        return Job(name=self.job.name, state=Job.STATE_CANCELLED)

    async def DeleteTrainingJob(self, request: Any, context: Any) -> empty_pb2.Empty:
        await self._note("DeleteTrainingJob", request, context)
        return empty_pb2.Empty()

    async def ListCheckpoints(self, request: Any, context: Any) -> training_pb2.ListCheckpointsResponse:
        await self._note("ListCheckpoints", request, context)
        saved = [
            happened.checkpoint_saved.checkpoint for happened in self.happened if happened.checkpoint_saved.ByteSize()
        ]
        return training_pb2.ListCheckpointsResponse(checkpoints=saved)

    async def WatchTrainingJob(
        self, request: training_pb2.WatchTrainingJobRequest, context: Any
    ) -> AsyncIterator[training_pb2.WatchTrainingJobResponse]:
        self.watches.append(request.after_sequence)
        after, left = request.after_sequence, self.breaks.popleft() if self.breaks else None
        try:
            while True:
                self.news.clear()
                for happened in self.happened[after:]:
                    if left == 0:
                        await Failure(code=grpc.StatusCode.UNAVAILABLE, reason="DRAINING").abort(context)
                    yield training_pb2.WatchTrainingJobResponse(events=[happened])
                    after, left = happened.sequence, None if left is None else left - 1
                if left == 0:
                    await Failure(code=grpc.StatusCode.UNAVAILABLE, reason="DRAINING").abort(context)
                if self._job_now().state in FINAL and len(self.happened) == len(self.events):
                    return
                await self.news.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def failed_status(message: str) -> status_pb2.Status:
    return status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message)


def row(**fields: Any) -> struct_pb2.Struct:
    values = struct_pb2.Struct()
    values.update(fields)
    return values


@contextlib.asynccontextmanager
async def serving_training(fake: FakeTraining) -> AsyncIterator[str]:
    """Serve ``fake``; the address."""
    server = grpc.aio.server()
    dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(fake, server)
    training_service_pb2_grpc.add_TrainingServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


class TrainingThread:
    """The fake on an event loop of its own, as a synchronous test needs it."""

    def __enter__(self) -> TrainingThread:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.fake = self.run(self._make())
        self.context = serving_training(self.fake)
        self.address = self.run(self.context.__aenter__())
        return self

    async def _make(self) -> FakeTraining:
        return FakeTraining()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def call(self, work: Any, *args: Any) -> None:
        """Run a plain function on the loop's thread."""
        self.loop.call_soon_threadsafe(work, *args)

    def __exit__(self, *error: object) -> None:
        self.run(self.context.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
