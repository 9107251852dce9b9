"""The classic tasks: ``client.tasks``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import grpc
from google.protobuf import struct_pb2

from slipstream.inference.v1 import inference_service_pb2_grpc, tasks_pb2
from slipstream_client import convert
from slipstream_client.connection import Attempts, Connection, Source
from slipstream_client.errors import InvalidRequestError
from slipstream_client.options import CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import plain
from slipstream_client.requests import checked_text
from slipstream_client.spelling import message_of, plain_data
from slipstream_client.task_results import (
    Classification,
    Embedding,
    Task,
    TaskAnswer,
    TaskParameter,
    TaskResult,
    result_from_proto,
)

TaskInput = str | Mapping[str, Any] | tasks_pb2.TaskInput
"""An input: a text; a mapping from one kind to its value, as ``{"question_answering": {"question": ..., "context":
...}}`` or ``{"image": data}``, the data as bytes or in base64; or the message itself."""

_BYTES_KINDS = frozenset({"image", "audio", "video"})
_INPUTS_PER_MESSAGE = 32


class Tasks:
    """Runs tasks and tells what there are. Models are named by id or resource name; empty: the task's default one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        """The raw stub."""
        return inference_service_pb2_grpc.InferenceServiceStub(self._connection.channel("inference"))

    async def run(
        self,
        task: str,
        inputs: TaskInput | Sequence[TaskInput],
        *,
        model: str = "",
        adapter: str = "",
        parameters: Mapping[str, Any] | None = None,
        **call: Unpack[CallOptions],
    ) -> TaskAnswer:
        """Run a task on one input or several; results keep their order, and each may have failed alone."""
        several = [inputs] if isinstance(inputs, str | Mapping | tasks_pb2.TaskInput) else list(inputs)
        request = tasks_pb2.RunTaskRequest(
            model=model,
            adapter=adapter,
            task=task,
            inputs=[input_message(given, f"inputs[{place}]") for place, given in enumerate(several)],
            parameters=_struct(parameters),
        )
        answer = await self._connection.unary("inference", self.stub.RunTask, request, **call)
        return TaskAnswer(
            results=tuple(result_from_proto(result, place) for place, result in enumerate(answer.results)),
            model=answer.model,
            adapter_version=answer.adapter_version,
            usage=convert.usage(answer.usage),
        )

    async def stream(
        self,
        task: str,
        inputs: Iterable[TaskInput] | AsyncIterable[TaskInput],
        *,
        model: str = "",
        adapter: str = "",
        parameters: Mapping[str, Any] | None = None,
        max_pending_inputs: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[TaskResult]:
        """Run a task on any number of inputs; results come as they are ready, with the ``index`` of their input.

        Inputs are asked for no faster than the service takes them. Never repeated by itself: inputs may be gone.
        """
        attempts = Attempts(self._connection.settings, "inference", timeout_s, request_id, repeatable=False)
        header = tasks_pb2.StreamTaskHeader(
            model=model,
            adapter=adapter,
            task=task,
            parameters=_struct(parameters),
            max_pending_inputs=max_pending_inputs,
        )
        source = Source(_messages(header, inputs))
        stream = self.stub.StreamTask(source, timeout=attempts.remaining_s, metadata=attempts.metadata)
        try:
            async for response in stream:
                yield result_from_proto(response.result, response.index)
        except grpc.aio.AioRpcError as error:
            await attempts.wait_or_raise(error)
        except asyncio.CancelledError:
            if source.failure is not None:
                raise source.failure from None
            raise
        finally:
            stream.cancel()

    async def classify(
        self, texts: str | Sequence[str], *, model: str = "", adapter: str = "", top_k: int | None = None
    ) -> list[Classification]:
        """The labels of one text or several."""
        answer = await self.run("text-classification", texts, model=model, adapter=adapter, parameters={"top_k": top_k})
        return answer.values()

    async def embed(
        self, texts: str | Sequence[str], *, model: str = "", pooling: str = "mean", normalize: bool = True
    ) -> list[tuple[float, ...]]:
        """A vector for each text."""
        parameters = {"pooling": pooling, "normalize": normalize}
        answer = await self.run("feature-extraction", texts, model=model, parameters=parameters)
        found: list[Embedding] = answer.values()
        return [embedding.vector.values for embedding in found]

    async def list(self, *, model: str = "", **call: Unpack[CallOptions]) -> list[Task]:
        """Every task, by id; with ``model`` only those that it can do."""
        request = tasks_pb2.ListTasksRequest(model=model, page_size=100)
        return await all_pages(
            self._connection, "inference", self.stub.ListTasks, request, lambda page: map(_task, page.tasks),
            limit=100, **call,
        )  # fmt: skip

    async def describe(self, name: str, **call: Unpack[CallOptions]) -> Task:
        """One task by its id or an alias. Raises NotFoundError."""
        request = tasks_pb2.DescribeTaskRequest(name=name)
        return _task(await self._connection.unary("inference", self.stub.DescribeTask, request, **call))


def input_message(given: TaskInput, path: str) -> tasks_pb2.TaskInput:
    """An input as a message; what does not fit is refused by its path."""
    if isinstance(given, tasks_pb2.TaskInput):
        return given
    if isinstance(given, str):
        return tasks_pb2.TaskInput(text=checked_text(path, given))
    if len(given) != 1:
        raise InvalidRequestError.of(path, "is neither a text nor a mapping from one kind to its value")
    ((kind, value),) = given.items()
    if kind in _BYTES_KINDS and isinstance(value, bytes | str):
        value = {"data": value}
    if isinstance(value, Mapping):  # a picture or sound inside may be given as bytes, too
        value = {name: {"data": item} if isinstance(item, bytes) and name != "data" else item
                 for name, item in value.items()}  # fmt: skip
    return message_of(tasks_pb2.TaskInput, path, {kind: value})


async def _messages(
    header: tasks_pb2.StreamTaskHeader, inputs: Iterable[TaskInput] | AsyncIterable[TaskInput]
) -> AsyncIterator[tasks_pb2.StreamTaskRequest]:
    """The header, then the inputs: several in a message where they are there at once."""
    yield tasks_pb2.StreamTaskRequest(header=header)
    place = 0
    if isinstance(inputs, AsyncIterable):
        async for given in inputs:
            yield tasks_pb2.StreamTaskRequest(inputs=[input_message(given, f"inputs[{place}]")])
            place += 1
        return
    batch: list[tasks_pb2.TaskInput] = []
    for given in inputs:
        batch.append(input_message(given, f"inputs[{place}]"))
        place += 1
        if len(batch) == _INPUTS_PER_MESSAGE:
            yield tasks_pb2.StreamTaskRequest(inputs=batch)
            batch = []
    if batch:
        yield tasks_pb2.StreamTaskRequest(inputs=batch)


def _struct(parameters: Mapping[str, Any] | None) -> struct_pb2.Struct:
    values = {name: value for name, value in (parameters or {}).items() if value is not None}
    return plain_data(struct_pb2.Struct, "parameters", values)


def _task(proto: tasks_pb2.Task) -> Task:
    task = plain(Task, proto)
    return replace(task, parameters=tuple(map(_with_its_default, task.parameters)))


def _with_its_default(parameter: TaskParameter) -> TaskParameter:
    """JSON has one kind of number: the default of a whole one comes as a float."""
    is_whole = parameter.type == "int" and parameter.default_value is not None
    return replace(parameter, default_value=int(parameter.default_value)) if is_whole else parameter
