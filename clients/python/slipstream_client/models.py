"""The models of an inference service: ``client.models``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime
from typing import Unpack

from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream.inference.v1 import model_service_pb2_grpc
from slipstream_client.connection import Connection
from slipstream_client.options import CallOptions

PAGE_SIZE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a download or a load has come; ``total_count`` None while unknown. ``unit`` says what is counted."""

    stage: str
    completed_count: int
    total_count: int | None
    unit: str

    @property
    def fraction(self) -> float | None:
        return self.completed_count / self.total_count if self.total_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model known to the service; what is empty or zero is not known yet.

    ``state``: unloaded, downloading, loading, ready, ...
    """

    name: str
    source: str
    revision: str
    state: str
    state_message: str
    error: str
    progress: Progress | None
    data_type: str
    quantization: str
    batching: str
    devices: tuple[str, ...]
    context_tokens: int
    parameter_count: int
    architecture: str
    tasks: tuple[str, ...]
    has_chat_template: bool
    memory_bytes: int
    disk_bytes: int
    adapter_slot_count: int
    loaded_adapter_versions: tuple[str, ...]
    licence: str
    base_model: str
    pinned: bool
    load_time: datetime | None

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


class Models:
    """Reading and following models. Model names are ids (``smollm2``) or resource names (``models/smollm2``)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> model_service_pb2_grpc.ModelServiceAsyncStub:
        """The raw stub."""
        return model_service_pb2_grpc.ModelServiceStub(self._connection.channel("inference"))

    async def list(self, *, task: str = "", **call: Unpack[CallOptions]) -> list[Model]:
        """Every model the service knows, by name; with ``task`` only those that can do it."""
        found: list[Model] = []
        request = model_pb2.ListModelsRequest(page_size=PAGE_SIZE, task=task)
        while True:
            page = await self._connection.unary("inference", self.stub.ListModels, request, **call)
            found += map(model_from_proto, page.models)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def get(self, name: str, **call: Unpack[CallOptions]) -> Model:
        """One model. Raises NotFoundError."""
        request = model_pb2.GetModelRequest(name=name)
        return model_from_proto(await self._connection.unary("inference", self.stub.GetModel, request, **call))

    async def watch(self, *names: str, **call: Unpack[CallOptions]) -> AsyncGenerator[Model]:
        """Every model as it is now, then again whenever it changes. Deletions are passed over."""
        request = model_pb2.WatchModelsRequest(names=names)
        events = self._connection.stream("inference", self.stub.WatchModels, request, is_answer=_is_any, **call)
        try:
            async for event in events:
                if event.WhichOneof("event") == "model":
                    yield model_from_proto(event.model)
        finally:
            await events.aclose()


def _is_any(event: model_pb2.WatchModelsResponse) -> bool:
    return True


def model_from_proto(proto: model_pb2.Model) -> Model:
    """The result for a Model message."""
    return Model(
        name=proto.name,
        source=proto.source,
        revision=proto.revision,
        state=_field_word(proto, "state", "STATE_"),
        state_message=proto.state_message,
        error=proto.error.message,
        progress=_progress(proto),
        data_type=_field_word(proto, "data_type", "DATA_TYPE_"),
        quantization=_field_word(proto, "quantization", "QUANTIZATION_"),
        batching=_field_word(proto, "batching", "BATCHING_"),
        devices=tuple(proto.devices),
        context_tokens=proto.context_tokens,
        parameter_count=proto.parameter_count,
        architecture=proto.architecture,
        tasks=tuple(proto.tasks),
        has_chat_template=proto.has_chat_template,
        memory_bytes=proto.memory_bytes,
        disk_bytes=proto.disk_bytes,
        adapter_slot_count=proto.adapter_slot_count,
        loaded_adapter_versions=tuple(proto.loaded_adapter_versions),
        licence=proto.licence,
        base_model=proto.base_model,
        pinned=proto.pinned,
        load_time=proto.load_time.ToDatetime() if proto.HasField("load_time") else None,
    )


def _progress(proto: model_pb2.Model) -> Progress | None:
    if not proto.HasField("progress"):
        return None
    progress = proto.progress
    return Progress(
        stage=progress.stage,
        completed_count=progress.completed_count,
        total_count=progress.total_count if progress.HasField("total_count") else None,
        unit=progress.unit,
    )


def _field_word(proto: model_pb2.Model, field: str, prefix: str) -> str:
    """The name of an enum field's value in lower case; empty where unspecified or newer than this client."""
    kind = proto.DESCRIPTOR.fields_by_name[field].enum_type
    assert kind is not None, f"{field} is no enum"
    value = kind.values_by_number.get(getattr(proto, field))
    return _word(value.name, prefix) if value is not None else ""


def _word(name: str, prefix: str) -> str:
    word = name.removeprefix(prefix).lower()
    return "" if word == "unspecified" else word
