"""CreateModel and ExportModel: new models from configurations, and models given away. Event loop; no torch."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.type.v1 import artifact_pb2, progress_pb2
from slipstream_server.errors import InvalidField, UnsupportedField, WrongState
from slipstream_server.inference.creation import CreationPlan, CreationRequest, ModelCreation
from slipstream_server.inference.exports import DEFAULT_SHARD_BYTES, ExportRequest, Exports, chunks_of
from slipstream_server.inference.front import AdapterResolver
from slipstream_server.inference.model_records import ModelRecords
from slipstream_server.models.facts import ModelFacts, read_facts
from slipstream_server.models.tool_process import ToolProgress
from slipstream_server.resource_names import ModelName, check_id
from slipstream_server.rpc.inference.convert import model_id
from slipstream_server.rpc.inference.model_convert import data_type_word
from slipstream_server.rpc.inference.structs import struct_to_dict
from slipstream_server.rpc.request_context import caller
from slipstream_server.storage.request_records import RequestKey

Context = grpc.aio.ServicerContext[Any, Any]

PROGRESS_EVERY_S = 0.5
"""How often the contract allows progress alone to be news."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakingRooms:
    """What CreateModel and ExportModel work with. ``resolve_adapter`` is None where no registry is configured."""

    model_records: ModelRecords
    creation: ModelCreation
    exports: Exports
    resolve_adapter: AdapterResolver | None = None


class ModelMaking(ABC):
    """The methods that make files; a part of ``ModelServicer``, which gives it ``_making`` and ``_message``."""

    _making: MakingRooms

    @abstractmethod
    async def _message(self, model: str) -> pb2.Model:
        """The Model message of a known model, as GetModel would answer."""

    async def CreateModel(self, request: pb2.CreateModelRequest, context: Context) -> pb2.Model:
        name = check_id(request.model_id, "model_id")
        key = request_key("CreateModel", request.request_id, request)
        if key is not None and not request.validate_only:
            known = await self._making.model_records.answered(key)
            if known is not None:
                return await self._message(known)
        plan = await self._making.creation.plan(creation_request(name, request))
        if request.validate_only:
            return _planned(plan)
        await self._making.creation.begin(plan, key)
        return await self._message(name)

    async def ExportModel(
        self, request: pb2.ExportModelRequest, context: Context
    ) -> AsyncGenerator[pb2.ExportModelResponse, None]:
        wanted = await self._export_request(request)
        async with aclosing(_export(self._making.exports, wanted)) as responses:
            async for response in responses:
                yield response

    async def _export_request(self, request: pb2.ExportModelRequest) -> ExportRequest:
        model = model_id(request.name, "name")
        if not model:
            raise InvalidField.of("name", "is required")
        folder, facts = await self._stored(model)
        shard = request.max_shard_bytes if request.HasField("max_shard_bytes") else DEFAULT_SHARD_BYTES
        wanted = ExportRequest(
            model=model,
            folder=folder,
            facts=facts,
            data_type=data_type_word(request.data_type, "data_type"),
            max_shard_bytes=shard,
        )
        wanted.check()
        if not request.adapter:
            return wanted
        if self._making.resolve_adapter is None:
            raise UnsupportedField.of("adapter", "this service has no adapter registry")
        return replace(wanted, adapter=await self._making.resolve_adapter(model, request.adapter))

    async def _stored(self, model: str) -> tuple[Path, ModelFacts]:
        """The prepared folder of a known model, and its facts. Raises ModelNotFound, WrongState."""
        record = self._making.model_records.get(model)
        if record.creating:
            raise WrongState(f"model {model} is being made", metadata={"state": "CREATING"})
        if record.known_folder is None or not await asyncio.to_thread(record.known_folder.is_dir):
            raise WrongState(f"model {model} has no files here yet; load it first", metadata={"state": "UNLOADED"})
        return record.known_folder, await asyncio.to_thread(read_facts, record.known_folder)


async def _export(exports: Exports, request: ExportRequest) -> AsyncGenerator[pb2.ExportModelResponse, None]:
    """Progress while the files are made, the header, the chunks. Closing it ends the work and removes the files."""
    latest = _Latest()
    opening = exports.open(request, latest.report)
    entering = asyncio.create_task(opening.__aenter__(), name=f"export-{request.model}")
    try:
        async for progress in latest.until(entering):
            yield pb2.ExportModelResponse(progress=progress_message(progress))
        files = entering.result()
        announced = [
            artifact_pb2.ArtifactFile(path=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files
        ]
        version = request.adapter.version if request.adapter else ""
        header = pb2.ExportHeader(files=announced, model=str(ModelName(request.model)), adapter_version=version)
        yield pb2.ExportModelResponse(header=header)
        for index, file in enumerate(files):
            async with aclosing(chunks_of(file)) as chunks:
                async for offset, data in chunks:
                    chunk = artifact_pb2.ArtifactChunk(file_index=index, offset_bytes=offset, data=data)
                    yield pb2.ExportModelResponse(chunk=chunk)
    finally:
        await _closed(opening, entering)


async def _closed(opening: Any, entering: asyncio.Task[Any]) -> None:
    """Leave the export however far it came: cancelled in its making, it has cleaned up after itself."""
    if not entering.done():
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
    elif not entering.cancelled() and entering.exception() is None:
        await opening.__aexit__(None, None, None)


class _Latest:
    """The newest progress, for a reader who may be slower than the work."""

    def __init__(self) -> None:
        self._progress: ToolProgress | None = None
        self._changed = asyncio.Event()

    def report(self, progress: ToolProgress) -> None:
        self._progress = progress
        self._changed.set()

    async def until(self, work: asyncio.Task[Any]) -> AsyncIterator[ToolProgress]:
        """What is reported until ``work`` is done, at most twice a second; a new stage at once."""
        work.add_done_callback(lambda _: self._changed.set())
        stage, last_s = "", 0.0
        loop = asyncio.get_running_loop()
        while not work.done():
            await self._changed.wait()
            self._changed.clear()
            progress = self._progress
            if progress is not None and (progress.stage != stage or loop.time() - last_s >= PROGRESS_EVERY_S):
                stage, last_s = progress.stage, loop.time()
                yield progress


def creation_request(name: str, request: pb2.CreateModelRequest) -> CreationRequest:
    """What the message asks for. Raises InvalidField for what is no number of JSON, or no value of an enum."""
    which = request.WhichOneof("configuration")
    return CreationRequest(
        model=name,
        config_source=request.config_source if which == "config_source" else "",
        config=struct_to_dict(request.config, "config") if which == "config" else None,
        overrides=struct_to_dict(request.config_overrides, "config_overrides"),
        tokenizer_source=request.tokenizer_source,
        auto_class=request.auto_class,
        data_type=data_type_word(request.data_type, "data_type") or "float32",
        seed=request.seed if request.HasField("seed") else None,
        owner=caller(),
    )


def progress_message(progress: ToolProgress) -> progress_pb2.Progress:
    """The contract's Progress."""
    return progress_pb2.Progress(
        stage=progress.stage, completed_count=progress.done, total_count=progress.total, unit=progress.unit
    )


def request_key(method: str, request_id: str, request: Message) -> RequestKey | None:
    """Which request this is to its caller; None where the client asked for no idempotency."""
    if not request_id:
        return None
    serialized = request.SerializeToString(deterministic=True)
    return RequestKey.of(owner=caller(), method=method, request_id=request_id, request=serialized)


def _planned(plan: CreationPlan) -> pb2.Model:
    """The model as it would be."""
    return pb2.Model(
        name=str(ModelName(plan.request.model)),
        state=pb2.Model.STATE_CREATING,
        state_message="checked only; nothing was made",
        parameter_count=plan.num_parameters,
        architecture=plan.architecture,
        base_model=plan.base_model,
        disk_bytes=plan.weight_bytes,
        owner=plan.request.owner,
    )
