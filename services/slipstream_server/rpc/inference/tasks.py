"""The task methods of InferenceService: RunTask, StreamTask, ListTasks and DescribeTask. Event loop; no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from typing import Any

import grpc

from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.inference.v1 import tasks_pb2
from slipstream.type.v1 import usage_pb2
from slipstream_server.errors import InvalidField, InvalidRequest, QueueFull, ResourceExhausted, SlipstreamError
from slipstream_server.inference.front import InferenceFront
from slipstream_server.inference.task_calls import TaskCall
from slipstream_server.inference.task_runs import TaskOutcome, TaskRun
from slipstream_server.resource_names import ModelName
from slipstream_server.rpc.inference.convert import model_id
from slipstream_server.rpc.inference.task_descriptions import task_message
from slipstream_server.rpc.inference.task_inputs import parameters_of, task_input
from slipstream_server.rpc.inference.task_results import task_result
from slipstream_server.rpc.request_context import deadline_monotonic_s
from slipstream_server.storage.pages import PageRequest, decode_token, encode_token
from slipstream_server.tasks.inputs import MAX_INPUTS
from slipstream_server.tasks.items import TaskInput
from slipstream_server.tasks.registry import TASKS, get_task
from slipstream_server.tasks.specs import TaskSpec, missing_packages

DEFAULT_PENDING_INPUTS = 256
MAX_PENDING_INPUTS = 4096
MAX_PAGE_SIZE = 100

Context = grpc.aio.ServicerContext[Any, Any]


class TaskMethods(inference_grpc.InferenceServiceServicer):
    """The part of InferenceService that is about tasks."""

    _front: InferenceFront

    async def RunTask(self, request: tasks_pb2.RunTaskRequest, context: Context) -> tasks_pb2.RunTaskResponse:
        inputs = _inputs(request.inputs)
        with closing(await self._front.open_task(_call(request, context))) as run:
            run.add(inputs)
            results: list[tasks_pb2.TaskResult | None] = [None] * len(inputs)
            for _ in inputs:
                index, outcome = await run.next_result()
                _raise_for_all(outcome)
                results[index] = task_result(outcome)
            usage = usage_pb2.Usage(prompt_tokens=run.prompt_tokens, completion_tokens=run.completion_tokens)
            return tasks_pb2.RunTaskResponse(
                results=[result for result in results if result is not None],
                model=str(ModelName(run.model)),
                adapter_version=run.adapter_version,
                usage=usage,
            )

    async def StreamTask(
        self, request_iterator: AsyncIterator[tasks_pb2.StreamTaskRequest], context: Context
    ) -> AsyncIterator[tasks_pb2.StreamTaskResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.HasField("header"):
            raise InvalidField.of("header", "is not set in the first message of the stream")
        max_pending = _max_pending(first.header)
        with closing(await self._front.open_task(_call(first.header, context))) as run:
            reader = asyncio.create_task(_read(run, first, request_iterator, max_pending), name="task-inputs")
            try:
                async for response in _responses(run, reader):
                    yield response
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def ListTasks(self, request: tasks_pb2.ListTasksRequest, context: Context) -> tasks_pb2.ListTasksResponse:
        query = ("tasks", request.model)
        num_rows = PageRequest(query=query, page_size=request.page_size, max_page_size=MAX_PAGE_SIZE).num_rows()
        after = str(decode_token(query, request.page_token)[0]) if request.page_token else ""
        able = self._front.tasks_of(model_id(request.model)) if request.model else tuple(TASKS)
        wanted = [task for task in TASKS if task in able and task > after]
        response = tasks_pb2.ListTasksResponse(tasks=[self._task(TASKS[task]) for task in wanted[:num_rows]])
        if len(wanted) > num_rows:
            response.next_page_token = encode_token(query, (wanted[num_rows - 1],))
        return response

    async def DescribeTask(self, request: tasks_pb2.DescribeTaskRequest, context: Context) -> tasks_pb2.Task:
        name = request.name.removeprefix("tasks/")
        if not name:
            raise InvalidField.of("name", "is empty; tasks/ID, an id, or an alias")
        return self._task(get_task(name))

    def _task(self, spec: TaskSpec) -> tasks_pb2.Task:
        try:
            default_model = str(ModelName(self._front.task_model(spec)))
        except SlipstreamError:
            default_model = ""
        return task_message(spec, default_model=default_model, missing_packages=missing_packages(spec))


def _call(request: tasks_pb2.RunTaskRequest | tasks_pb2.StreamTaskHeader, context: Context) -> TaskCall:
    return TaskCall(
        task=request.task,
        model=model_id(request.model),
        adapter=request.adapter,
        parameters=parameters_of(request.parameters),
        deadline_monotonic_s=deadline_monotonic_s(context),
    )


def _inputs(messages: Iterable[tasks_pb2.TaskInput]) -> list[TaskInput]:
    found = list(messages)
    if len(found) > MAX_INPUTS:
        raise InvalidField.of("inputs", f"has {len(found)} entries; 1 to {MAX_INPUTS} are allowed")
    return [task_input(message, f"inputs[{place}]") for place, message in enumerate(found)]


def _raise_for_all(outcome: TaskOutcome) -> None:
    """What one input cannot help is the call's failure: the worker died, the deadline passed, the service drains."""
    if isinstance(outcome, SlipstreamError) and not isinstance(outcome, InvalidRequest | ResourceExhausted):
        raise outcome


def _max_pending(header: tasks_pb2.StreamTaskHeader) -> int:
    if not header.HasField("max_pending_inputs"):
        return DEFAULT_PENDING_INPUTS
    if not 1 <= header.max_pending_inputs <= MAX_PENDING_INPUTS:
        found = header.max_pending_inputs
        raise InvalidField.of("header.max_pending_inputs", f"{found} is not from 1 to {MAX_PENDING_INPUTS}")
    return int(header.max_pending_inputs)


async def _read(
    run: TaskRun,
    first: tasks_pb2.StreamTaskRequest,
    requests: AsyncIterator[tasks_pb2.StreamTaskRequest],
    max_pending: int,
) -> None:
    """Take inputs until the client has no more, never more ahead of their results than allowed."""
    await _take(run, first, max_pending)
    async for request in requests:
        if request.HasField("header"):
            raise InvalidField.of("header", "is set in a message after the first; one stream does one thing")
        await _take(run, request, max_pending)


async def _take(run: TaskRun, request: tasks_pb2.StreamTaskRequest, max_pending: int) -> None:
    inputs = _inputs(request.inputs)
    while inputs:
        await run.wait_for_room(max_pending)
        part = inputs[: max_pending - run.num_pending]
        try:
            run.add(part)
        except QueueFull:
            if not run.num_pending:  # nothing of ours will make room
                raise
            await run.wait_for_room(run.num_pending)
        else:
            inputs = inputs[len(part) :]


async def _responses(run: TaskRun, reader: asyncio.Task[None]) -> AsyncIterator[tasks_pb2.StreamTaskResponse]:
    """Results until the reader has ended and all its inputs are answered; the reader's failure, if it has one."""
    num_sent = 0
    while not (reader.done() and num_sent == run.num_added):
        found = run.ready_result() or await _next_or_end(run, reader)
        if found is None:
            continue
        index, outcome = found
        response = tasks_pb2.StreamTaskResponse(index=index, result=task_result(outcome))
        if not num_sent:
            response.model, response.adapter_version = str(ModelName(run.model)), run.adapter_version
        num_sent += 1
        yield response
    reader.result()


async def _next_or_end(run: TaskRun, reader: asyncio.Task[None]) -> tuple[int, TaskOutcome] | None:
    """The next result, or None when the reader ends before one comes; raises what the reader has failed with."""
    result = asyncio.create_task(run.next_result())
    try:
        await asyncio.wait({result} if reader.done() else {result, reader}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        reader.result()
        return None
    finally:
        result.cancel()
