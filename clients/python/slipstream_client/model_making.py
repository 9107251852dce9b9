"""Making models, exporting them and choosing among them: a part of ``client.models``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream.inference.v1 import model_service_pb2_grpc
from slipstream.type.v1 import artifact_pb2
from slipstream_client.adapter_results import ArtifactFile
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.errors import InvalidRequestError, ProtocolError
from slipstream_client.model_options import LOAD_FIELDS, EstimateOptions
from slipstream_client.model_results import MemoryEstimate, Model, ModelRecommendation, Progress
from slipstream_client.options import CallOptions
from slipstream_client.plain import plain
from slipstream_client.spelling import message_of
from slipstream_client.transfers import TRANSFER_TIMEOUT_S, Meter, OnProgress, arriving

SERVICE = "inference"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelExport:
    """What an export brought. ``adapter_version``: what was merged; empty for none."""

    model: str
    adapter_version: str
    files: tuple[ArtifactFile, ...]


class ModelMaking:
    """The methods that make, export and choose."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> model_service_pb2_grpc.ModelServiceAsyncStub:
        """The raw stub."""
        return model_service_pb2_grpc.ModelServiceStub(self._connection.channel(SERVICE))

    async def create(
        self,
        model_id: str,
        *,
        config_source: str = "",
        config: Mapping[str, Any] | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        tokenizer_source: str = "",
        auto_class: str = "",
        data_type: str = "",
        seed: int | None = None,
        validate_only: bool = False,
        **call: Unpack[CallOptions],
    ) -> Model:
        """Ask for a freshly initialised model, and answer at once; ``wait`` follows it until it is unloaded.

        Give either ``config_source`` (a model, a hub id, a catalogue entry) or a whole ``config``.
        """
        if (config is None) == (not config_source):
            raise InvalidRequestError.of("configuration", "give one of config_source and config")
        values = {
            "model_id": model_id,
            "config_source": config_source or None,
            "config": config,
            "config_overrides": config_overrides,
            "tokenizer_source": tokenizer_source,
            "auto_class": auto_class,
            "data_type": data_type,
            "seed": seed,
            "validate_only": validate_only,
        }
        request = message_of(model_pb2.CreateModelRequest, "", values)
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return plain(Model, await self._connection.unary(SERVICE, self.stub.CreateModel, request, **call))

    async def export(
        self,
        name: str,
        folder: str | Path,
        *,
        adapter: str = "",
        data_type: str = "",
        max_shard_bytes: int | None = None,
        on_progress: OnProgress | None = None,
        **call: Unpack[CallOptions],
    ) -> ModelExport:
        """Fetch a model's files into ``folder``, as Transformers reads them, with ``adapter`` merged into the weights.

        Each file appears whole and checked, or not at all.
        """
        values = {"name": name, "adapter": adapter, "data_type": data_type, "max_shard_bytes": max_shard_bytes}
        request = message_of(model_pb2.ExportModelRequest, "", values)
        call["timeout_s"] = call.get("timeout_s") or TRANSFER_TIMEOUT_S
        responses = self._connection.stream(
            SERVICE, self.stub.ExportModel, request, is_answer=lambda response: True, **call
        )
        async with aclosing(responses):
            return await _receive(responses, Path(folder), on_progress)

    async def estimate(self, source: str, **options: Unpack[EstimateOptions]) -> MemoryEstimate:
        """What a model would take if it were loaded so; nothing is downloaded but its configuration."""
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        call = CallOptions(timeout_s=given.pop("timeout_s", None), request_id=given.pop("request_id", None))
        request = model_pb2.EstimateModelMemoryRequest(source=source, revision=given.pop("revision", ""))
        if unknown := set(given) - LOAD_FIELDS:
            raise TypeError(f"estimate() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        request.options.CopyFrom(message_of(model_pb2.ModelLoadOptions, "options", given))
        answer = await self._connection.unary(SERVICE, self.stub.EstimateModelMemory, request, **call)
        return plain(MemoryEstimate, answer)

    async def recommend(
        self,
        task: str,
        *,
        memory_bytes: int = 0,
        licences: Sequence[str] = (),
        languages: Sequence[str] = (),
        min_context_tokens: int = 0,
        local_only: bool = False,
        max_results: int = 0,
        **call: Unpack[CallOptions],
    ) -> list[ModelRecommendation]:
        """Models of the catalogue for a task and a machine, best first. Nothing is downloaded."""
        values = {
            "task": task,
            "memory_bytes": memory_bytes,
            "licences": licences,
            "languages": languages,
            "min_context_tokens": min_context_tokens,
            "local_only": local_only,
            "page_size": max_results,
        }
        request = message_of(model_pb2.RecommendModelsRequest, "", values)
        answer = await self._connection.unary(SERVICE, self.stub.RecommendModels, request, **call)
        return [plain(ModelRecommendation, found) for found in answer.recommendations]


async def _receive(
    responses: AsyncIterator[model_pb2.ExportModelResponse], folder: Path, on_progress: OnProgress | None
) -> ModelExport:
    header = await _header(responses, on_progress)
    meter = Meter("receiving", sum(file.size_bytes for file in header.files), on_progress)
    chunk = await _next_chunk(responses)
    for index, said in enumerate(header.files):
        with arriving(folder, said) as arrival:
            while chunk is not None and chunk.file_index == index:
                arrival.write(chunk)
                meter.add(len(chunk.data))
                chunk = await _next_chunk(responses)
    if chunk is not None:
        raise ProtocolError(f"the server sent bytes of file {chunk.file_index} out of order")
    return plain(ModelExport, header)


async def _header(
    responses: AsyncIterator[model_pb2.ExportModelResponse], on_progress: OnProgress | None
) -> model_pb2.ExportHeader:
    async for response in responses:
        match response.WhichOneof("event"):
            case "header":
                return response.header
            case "progress" if on_progress is not None:
                on_progress(plain(Progress, response.progress))
            case "chunk":
                break
    raise ProtocolError("the export did not begin with its header")


async def _next_chunk(
    responses: AsyncIterator[model_pb2.ExportModelResponse],
) -> artifact_pb2.ArtifactChunk | None:
    response = await anext(responses, None)
    if response is None:
        return None
    if not response.HasField("chunk"):
        raise ProtocolError("the export has a message without a chunk after its header")
    return response.chunk
