"""The models of an inference service: ``client.models``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Unpack

from google.protobuf.duration_pb2 import Duration

from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream.inference.v1 import model_service_pb2_grpc
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.errors import ProtocolError, from_status
from slipstream_client.model_options import LOAD_FIELDS, LoadModelOptions
from slipstream_client.options import CallOptions
from slipstream_client.plain import failure, mapping_of
from slipstream_client.spelling import message_of

PAGE_SIZE = 200
SETTLED = frozenset({"ready", "unloaded", "failed"})


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
    vocabulary_size: int = 0
    attention_implementation: str = ""
    labels: tuple[str, ...] = ()
    load_options: Mapping[str, Any] | None = None
    error_reason: str = ""
    training_job: str = ""
    owner: str = ""
    etag: str = ""

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


class Models:
    """The models of a service. Names are ids (``smollm2``) or resource names (``models/smollm2``)."""

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

    async def load(self, name: str, **options: Unpack[LoadModelOptions]) -> Model:
        """Ask for a model to be made ready, and answer at once; ``wait`` follows it.

        ``source`` says where a new one comes from: a hub id, a catalogue entry, a folder of the service's model roots.
        Without any option a known model is held as it was last. A repeat after a lost connection changes nothing more.
        """
        call, given = _split(options)
        request = model_pb2.LoadModelRequest(name=name, **_head(given))
        if given:
            request.options.CopyFrom(message_of(model_pb2.ModelLoadOptions, "options", given))
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return model_from_proto(await self._connection.unary("inference", self.stub.LoadModel, request, **call))

    async def unload(
        self,
        name: str,
        *,
        grace_s: float | None = None,
        force: bool = False,
        etag: str = "",
        **call: Unpack[CallOptions],
    ) -> Model:
        """Take a model out of memory; running requests get ``grace_s``. Raises FailedPreconditionError (pinned)."""
        grace = None if grace_s is None else _duration(grace_s)
        request = model_pb2.UnloadModelRequest(name=name, grace=grace, force=force, etag=etag)
        return model_from_proto(await self._connection.unary("inference", self.stub.UnloadModel, request, **call))

    async def delete(self, name: str, *, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Forget an unloaded model, and the files that the service made. Raises FailedPreconditionError."""
        request = model_pb2.DeleteModelRequest(name=name, etag=etag)
        await self._connection.unary("inference", self.stub.DeleteModel, request, **call)

    async def wait(
        self, name: str, *, on_change: Callable[[Model], None] = lambda model: None, **call: Unpack[CallOptions]
    ) -> Model:
        """Follow a model until it is ready, or unloaded; ``on_change`` sees every step. Raises why it failed."""
        async with aclosing(self._protos((name,), call)) as protos:
            async for proto in protos:
                model = model_from_proto(proto)
                on_change(model)
                if model.state == "failed":
                    raise from_status(proto.error)
                if model.state in SETTLED:
                    return model
        raise ProtocolError(f"the watch of {name} ended before the model was ready")

    async def watch(self, *names: str, **call: Unpack[CallOptions]) -> AsyncGenerator[Model]:
        """Every model as it is now, then again whenever it changes. Deletions are passed over."""
        async with aclosing(self._protos(names, call)) as protos:
            async for proto in protos:
                yield model_from_proto(proto)

    async def _protos(self, names: tuple[str, ...], call: CallOptions) -> AsyncGenerator[model_pb2.Model]:
        request = model_pb2.WatchModelsRequest(names=names)
        events = self._connection.stream("inference", self.stub.WatchModels, request, is_answer=_is_any, **call)
        async with aclosing(events):
            async for event in events:
                if event.WhichOneof("event") == "model":
                    yield event.model


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
        vocabulary_size=proto.vocabulary_size,
        attention_implementation=proto.attention_implementation,
        labels=tuple(proto.labels),
        load_options=mapping_of(proto.load_options) if proto.HasField("load_options") else None,
        error_reason=failure(proto.error).reason,
        training_job=proto.training_job,
        owner=proto.owner,
        etag=proto.etag,
    )


def _split(options: Any) -> tuple[CallOptions, dict[str, Any]]:
    rest = {key: value for key, value in options.items() if value is not None}
    return CallOptions(timeout_s=rest.pop("timeout_s", None), request_id=rest.pop("request_id", None)), rest


def _head(given: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the load options, taken out of ``given``; what is left must be one of them."""
    head: dict[str, Any] = {
        name: given.pop(name) for name in ("source", "revision", "pinned", "validate_only") if name in given
    }
    if unknown := set(given) - LOAD_FIELDS:
        raise TypeError(f"load() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    return head


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


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
