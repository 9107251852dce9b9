"""What the service says of its models: the results of ``client.models``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream_client.plain import failure, mapping_of


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
