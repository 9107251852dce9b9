"""Models between protobuf and the domain. Pure functions; a bad field is InvalidField or UnsupportedField."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from slipstream.inference.v1 import architecture_pb2, model_service_pb2
from slipstream.type.v1 import precision_pb2
from slipstream_server.errors import InvalidField
from slipstream_server.inference.engines import CONTINUOUS, PADDED
from slipstream_server.inference.front import ModelPlan
from slipstream_server.inference.generation import Ready
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.model_loads import LoadWish
from slipstream_server.inference.model_records import StoredModel
from slipstream_server.inference.model_states import ModelView
from slipstream_server.inference.plans import held_quantization
from slipstream_server.inference.supervisor import ModelState, ModelStatus
from slipstream_server.models.catalogue import CatalogueEntry, HubSource, builtin_catalogue
from slipstream_server.models.facts import ModelFacts, facts_of_config
from slipstream_server.models.progress import PullStage
from slipstream_server.models.task_classes import kind_of, tasks_of
from slipstream_server.resource_names import ModelName
from slipstream_server.rpc.inference.convert import model_id
from slipstream_server.rpc.status import status_of

Model = model_service_pb2.Model

_STATES = {
    ModelState.UNLOADED: Model.STATE_UNLOADED,
    ModelState.CREATING: Model.STATE_CREATING,
    ModelState.LOADING: Model.STATE_LOADING,
    ModelState.READY: Model.STATE_READY,
    ModelState.RESTARTING: Model.STATE_RESTARTING,
    ModelState.FAILED: Model.STATE_FAILED,
    ModelState.UNLOADING: Model.STATE_UNLOADING,
}
_DATA_TYPES = {
    "float32": precision_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": precision_pb2.DATA_TYPE_BFLOAT16,
    "float16": precision_pb2.DATA_TYPE_FLOAT16,
    "float64": precision_pb2.DATA_TYPE_FLOAT64,
}
_QUANTIZATIONS = {
    "none": precision_pb2.QUANTIZATION_NONE,
    "int8": precision_pb2.QUANTIZATION_INT8,
    "nf4": precision_pb2.QUANTIZATION_NF4,
    "fp4": precision_pb2.QUANTIZATION_FP4,
    "gptq": precision_pb2.QUANTIZATION_GPTQ,
    "awq": precision_pb2.QUANTIZATION_AWQ,
}
_BATCHINGS = {
    PADDED: model_service_pb2.BATCHING_PADDED,
    CONTINUOUS: model_service_pb2.BATCHING_CONTINUOUS,
}
_OPTIONAL = (
    "context_tokens", "max_running_sequences", "memory_fraction", "adapter_slot_count", "max_adapter_rank",
    "tensor_parallel_count", "prefix_caching",
)  # fmt: skip
_PLAIN = ("device", "attention_implementation", "batch_invariant", "double_quantization")
_FETCHING = frozenset({PullStage.RESOLVING, PullStage.DOWNLOADING, PullStage.EXTRACTING})
_MAX_GRACE_S, _DEFAULT_GRACE_S = 600.0, 30.0


def load_wish(request: model_service_pb2.LoadModelRequest, owner: str) -> LoadWish:
    """What a client asks of LoadModel."""
    return LoadWish(
        name=required_model_id(request.name),
        source=request.source,
        revision=request.revision,
        options=load_choice(request.options) if request.HasField("options") else None,
        pinned=request.pinned if request.HasField("pinned") else None,
        owner=owner,
    )


def required_model_id(name: str) -> str:
    """The id in ``name``, which must not be empty."""
    if not name:
        raise InvalidField.of("name", "is required: models/{model}, or its id")
    return model_id(name, "name")


def load_choice(options: model_service_pb2.ModelLoadOptions) -> LoadChoice:
    """ModelLoadOptions without protobuf."""
    given: Any = options
    return LoadChoice(
        data_type=data_type_word(options.data_type, "options.data_type"),
        quantization=_word(options.quantization, _QUANTIZATIONS, "options.quantization"),
        batching=_word(options.batching, _BATCHINGS, "options.batching"),
        **{name: getattr(given, name) for name in _PLAIN},
        **{name: getattr(given, name) for name in _OPTIONAL if given.HasField(name)},
    )


def data_type_word(value: int, field: str) -> str:
    """The type's name as torch has it; empty where unspecified."""
    return _word(value, _DATA_TYPES, field)


def family_number(word: str) -> architecture_pb2.ArchitectureFamily.ValueType:
    """The enum's value for a family as catalogue, facts and tasks spell it."""
    return architecture_pb2.ArchitectureFamily.Value(f"ARCHITECTURE_FAMILY_{word.upper()}")


def load_options_message(choice: LoadChoice) -> model_service_pb2.ModelLoadOptions:
    """ModelLoadOptions of what was asked for."""
    message = model_service_pb2.ModelLoadOptions(**{name: getattr(choice, name) for name in _PLAIN})
    if choice.data_type:
        message.data_type = _DATA_TYPES[choice.data_type]
    if choice.quantization:
        message.quantization = _QUANTIZATIONS[choice.quantization]
    if choice.batching:
        message.batching = _BATCHINGS[choice.batching]
    for name in _OPTIONAL:
        if (value := getattr(choice, name)) is not None:
            setattr(message, name, value)
    return message


def grace_s(request: model_service_pb2.UnloadModelRequest) -> float:
    """How long running requests may go on."""
    if not request.HasField("grace"):
        return _DEFAULT_GRACE_S
    grace: Duration = request.grace
    seconds = grace.seconds + grace.nanos / 1e9
    if not 0 <= seconds <= _MAX_GRACE_S:
        raise InvalidField.of("grace", f"{seconds:g} s is not from 0 s to {_MAX_GRACE_S:g} s")
    return seconds


def model_message(view: ModelView, replica_id: str) -> Model:
    """The resource."""
    record, status = view.record, view.status
    model = Model(
        name=str(ModelName(record.id)),
        source=record.source,
        revision=record.revision,
        state=_STATES[status.state],
        memory_bytes=view.needed_bytes,
        pinned=record.pinned,
        licence=record.licence,
        training_job=record.training_job,
        base_model=record.base_model,
        owner=record.owner,
    )
    if record.options is not None:
        model.load_options.CopyFrom(load_options_message(record.options))
    _tell_state(model, status)
    _tell_source(model, view)
    if view.files is not None:
        _tell_facts(model, view.files.facts)
        model.disk_bytes = view.files.disk_bytes
        model.licence = model.licence or view.files.licence
    if isinstance(record, StoredModel):
        _tell_stored(model, record, view.change_time)
        if load_time := view.status.ready_time or record.load_time:
            model.load_time.CopyFrom(_timestamp(load_time))
        _tell_replica(model, replica_id)
    if view.plan is not None:
        model.context_tokens = view.plan.max_context_tokens or view.plan.facts.context_tokens or 0
    if status.ready is not None and view.plan is not None:
        _tell_loaded(model, status.ready, view.plan)
        model.loaded_adapter_versions.extend(sorted(status.stats.adapters) if status.stats is not None else ())
    return model


def catalogue_entry_message(entry: CatalogueEntry, *, is_local: bool) -> model_service_pb2.CatalogueEntry:
    """An entry of the catalogue."""
    first = entry.sources[0]
    return model_service_pb2.CatalogueEntry(
        id=entry.name,
        source=first.repository if isinstance(first, HubSource) else first.package,
        title=entry.title or entry.name,
        description=entry.description,
        licence=entry.license,
        gated=entry.gated,
        tasks=entry.tasks,
        family=_entry_family(entry),
        parameter_count=entry.num_parameters,
        context_tokens=entry.context_tokens,
        download_bytes=entry.size_bytes,
        languages=entry.languages,
        available_locally=is_local,
    )


def _entry_family(entry: CatalogueEntry) -> architecture_pb2.ArchitectureFamily.ValueType:
    if entry.family:
        return family_number(entry.family)
    if not entry.config:
        return architecture_pb2.ARCHITECTURE_FAMILY_UNSPECIFIED
    return family_number(facts_of_config(entry.config).family)


def _tell_state(model: Model, status: ModelStatus) -> None:
    if status.state not in (ModelState.READY, ModelState.LOADING):
        model.state_message = status.stage
    if status.state in (ModelState.LOADING, ModelState.CREATING) and status.stage:
        if status.stage in _FETCHING:
            model.state = Model.STATE_DOWNLOADING
        model.progress.stage = status.stage
        model.progress.completed_count = round(100 * status.progress)
        model.progress.total_count = 100
        model.progress.unit = "percent"
    if status.error is not None:
        model.error.CopyFrom(status_of(status.error))


def _tell_source(model: Model, view: ModelView) -> None:
    catalogue, record = builtin_catalogue(), view.record
    if record.source in catalogue:
        entry = catalogue.get(record.source)
        model.catalogue_entry.CopyFrom(catalogue_entry_message(entry, is_local=view.files is not None))
        model.licence = model.licence or entry.license
        model.tasks.extend(entry.tasks)


def _tell_facts(model: Model, facts: ModelFacts) -> None:
    model.context_tokens = facts.context_tokens or 0
    model.vocabulary_size = facts.vocab_size or 0
    model.parameter_count = facts.num_parameters
    model.architecture = facts.architectures[0] if facts.architectures else ""
    model.family = family_number(kind_of(facts))
    model.labels.extend(facts.labels)
    model.has_chat_template = facts.has_chat_template
    model.tasks.extend(task for task in tasks_of(facts) if task not in model.tasks)


def _tell_stored(model: Model, record: StoredModel, change_time: datetime | None) -> None:
    model.revision = record.resolved_revision or record.revision
    model.create_time.CopyFrom(_timestamp(record.create_time))
    model.update_time.CopyFrom(_timestamp(max(record.update_time, change_time or record.update_time)))
    model.etag = record.etag


def _tell_loaded(model: Model, ready: Ready, plan: ModelPlan) -> None:
    model.data_type = _DATA_TYPES.get(ready.dtype, precision_pb2.DATA_TYPE_UNSPECIFIED)
    model.quantization = _QUANTIZATIONS.get(held_quantization(plan), precision_pb2.QUANTIZATION_UNSPECIFIED)
    model.devices.append(ready.device)
    model.attention_implementation = ready.attention
    model.batching = _BATCHINGS.get(ready.batching, model_service_pb2.BATCHING_UNSPECIFIED)
    model.memory_bytes = ready.memory_bytes
    model.adapter_slot_count = plan.worker.adapter_slots
    model.replica_statuses[0].memory_bytes = ready.memory_bytes


def _tell_replica(model: Model, replica_id: str) -> None:
    now = Timestamp()
    now.GetCurrentTime()
    # To the second, so that a model that has not changed reads the same.
    now.nanos = 0
    model.replica_statuses.add(
        replica_id=replica_id, state=model.state, state_message=model.state_message, report_time=now
    )


def _word(value: int, words: Mapping[str, int], field: str) -> str:
    """The word of an enum's value; empty where it is unspecified."""
    if not value:
        return ""
    for word, number in words.items():
        if number == value:
            return word
    raise InvalidField.of(field, f"{value} is no value that can be asked for; allowed: {', '.join(words)}")


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
