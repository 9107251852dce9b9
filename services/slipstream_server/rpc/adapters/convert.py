"""The registry's resources as protobuf, and its changes as the bytes that the event log keeps. Pure functions."""

from __future__ import annotations

from datetime import datetime

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.type.v1 import artifact_pb2, lora_pb2
from slipstream_server.adapters.gate import AliasGate, MetricCondition
from slipstream_server.adapters.journal import AdapterDeleted, AliasDeleted, Change, Entry
from slipstream_server.adapters.resources import (
    ActiveAdapter,
    Adapter,
    Alias,
    AliasPosition,
    LoraSummary,
    Version,
    version_name,
)
from slipstream_server.adapters.tables import VersionState
from slipstream_server.adapters.watching import Events, Heartbeat, News, Snapshot
from slipstream_server.resource_names import AdapterName, ModelName
from slipstream_server.storage.event_log import StoredEvent

DIGEST_PREFIX = "sha256:"

STATES = {
    VersionState.IMPORTING: pb2.AdapterVersion.STATE_IMPORTING,
    VersionState.REGISTERED: pb2.AdapterVersion.STATE_REGISTERED,
    VersionState.VERIFIED: pb2.AdapterVersion.STATE_VERIFIED,
    VersionState.FAILED: pb2.AdapterVersion.STATE_FAILED,
    VersionState.RETIRED: pb2.AdapterVersion.STATE_RETIRED,
}
_BIASES = {
    "none": lora_pb2.LORA_BIAS_NONE,
    "lora_only": lora_pb2.LORA_BIAS_LORA_ONLY,
    "all": lora_pb2.LORA_BIAS_ALL,
}


def adapter_message(adapter: Adapter) -> pb2.Adapter:
    return pb2.Adapter(
        name=str(AdapterName(adapter.id)),
        display_name=adapter.display_name,
        description=adapter.description,
        base_model=adapter.base_model,
        latest_version="" if adapter.latest_number is None else version_name(adapter.id, adapter.latest_number),
        version_count=adapter.num_versions,
        labels=adapter.labels,
        owner=adapter.owner,
        create_time=timestamp(adapter.create_time),
        update_time=timestamp(adapter.update_time),
        etag=adapter.etag,
    )


def version_message(version: Version) -> pb2.AdapterVersion:
    message = pb2.AdapterVersion(
        name=version.name,
        state=STATES[version.state],
        state_message=version.state_message,
        digest=f"{DIGEST_PREFIX}{version.digest}" if version.digest else "",
        files=[
            artifact_pb2.ArtifactFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in version.files
        ],
        size_bytes=version.size_bytes,
        base_model=version.base_model,
        base_model_revision=version.base_model_revision,
        provenance=json_format.Parse(version.provenance, pb2.Provenance(), ignore_unknown_fields=True),
        metrics=version.metrics,
        aliases=version.aliases,
        owner=version.owner,
        create_time=timestamp(version.create_time),
        update_time=timestamp(version.update_time),
        etag=version.etag,
    )
    if version.lora is not None:
        message.lora.CopyFrom(_lora(version.lora))
        message.task_type = version.lora.task_type
    if version.state is VersionState.FAILED:
        message.error.code = code_pb2.FAILED_PRECONDITION
        message.error.message = version.error_message
        reason = error_details_pb2.ErrorInfo(reason=version.error_reason, domain="slipstream")
        message.error.details.add().Pack(reason)
    return message


def alias_message(alias: Alias) -> pb2.AdapterAlias:
    return pb2.AdapterAlias(
        name=alias.name,
        version=alias.version,
        generation=alias.generation,
        history=[_position(alias.adapter, position) for position in alias.history],
        gate=None if alias.gate is None else _gate_message(alias.gate),
        create_time=timestamp(alias.create_time),
        update_time=timestamp(alias.update_time),
        etag=str(alias.generation),
    )


def active_message(active: ActiveAdapter) -> pb2.ActiveAdapter:
    return pb2.ActiveAdapter(
        model=str(ModelName(active.model)),
        adapter=active.adapter,
        enabled=active.enabled,
        generation=active.generation,
        update_time=timestamp(active.update_time),
    )


def encode_change(change: Change) -> bytes:
    """``change`` as an AdapterEvent without its number and time, which the event log knows."""
    event = pb2.AdapterEvent()
    match change:
        case Adapter():
            event.adapter_changed.CopyFrom(adapter_message(change))
        case Version():
            event.version_changed.CopyFrom(version_message(change))
        case Alias():
            event.alias_changed.CopyFrom(alias_message(change))
        case ActiveAdapter():
            event.active_adapter_changed.CopyFrom(active_message(change))
        case AliasDeleted():
            event.alias_deleted = change.name
        case AdapterDeleted():
            event.adapter_deleted = change.name
    return event.SerializeToString(deterministic=True)


def change_of(entry: Entry) -> pb2.AdapterEvent:
    """What an entry of the journal says happened."""
    return pb2.AdapterEvent.FromString(entry.payload)


def watch_response(news: News, watch_id: str) -> pb2.WatchAdaptersResponse:
    match news:
        case Snapshot():
            return pb2.WatchAdaptersResponse(snapshot=_snapshot(news), watch_id=watch_id)
        case Events():
            batch = pb2.AdapterEventBatch(events=[_event(event) for event in news.events])
            return pb2.WatchAdaptersResponse(events=batch, watch_id=watch_id)
        case Heartbeat():
            heartbeat = pb2.AdapterHeartbeat(sequence=news.sequence)
            return pb2.WatchAdaptersResponse(heartbeat=heartbeat, watch_id=watch_id)


def gate_of(gate: pb2.AliasGate) -> AliasGate:
    """Raises InvalidField for conditions that cannot be."""
    return AliasGate(
        conditions=tuple(
            MetricCondition(
                metric=condition.metric,
                lower_is_better=condition.lower_is_better,
                threshold=condition.threshold if condition.HasField("threshold") else None,
                max_regression=condition.max_regression if condition.HasField("max_regression") else None,
            )
            for condition in gate.conditions
        ),
        verified_only=gate.verified_only,
    )


def timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def _lora(lora: LoraSummary) -> lora_pb2.LoraConfig:
    return lora_pb2.LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        bias=_BIASES[lora.bias],
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _position(adapter: str, position: AliasPosition) -> pb2.AliasChange:
    return pb2.AliasChange(
        version=version_name(adapter, position.number),
        generation=position.generation,
        set_time=timestamp(position.set_time),
        set_by=position.set_by,
        comment=position.comment,
        gate_overridden=position.gate_overridden,
    )


def _gate_message(gate: AliasGate) -> pb2.AliasGate:
    conditions = [
        pb2.MetricCondition(
            metric=condition.metric,
            lower_is_better=condition.lower_is_better,
            threshold=condition.threshold,
            max_regression=condition.max_regression,
        )
        for condition in gate.conditions
    ]
    return pb2.AliasGate(conditions=conditions, verified_only=gate.verified_only)


def _snapshot(snapshot: Snapshot) -> pb2.RegistrySnapshot:
    return pb2.RegistrySnapshot(
        sequence=snapshot.sequence,
        versions=[version_message(version) for version in snapshot.versions],
        aliases=[alias_message(alias) for alias in snapshot.aliases],
        active_adapters=[active_message(active) for active in snapshot.active],
    )


def _event(stored: StoredEvent) -> pb2.AdapterEvent:
    event = pb2.AdapterEvent.FromString(stored.payload)
    event.sequence = stored.sequence
    event.event_time.CopyFrom(timestamp(stored.time))
    return event
