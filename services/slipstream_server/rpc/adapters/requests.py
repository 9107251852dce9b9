"""Requests of the adapter service in the words of the registry. Pure functions; a bad field is InvalidField."""

from __future__ import annotations

from google.protobuf import json_format
from google.protobuf.message import Message

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream_server.adapters.adapters import CHANGEABLE, AdapterSettings
from slipstream_server.adapters.aliases import GateUse, Move
from slipstream_server.adapters.intake import AnnouncedFile, Chunk, check_base_name
from slipstream_server.adapters.references import parse_adapter_id
from slipstream_server.adapters.tables import VersionState
from slipstream_server.adapters.versions import VersionDetails
from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.resource_names import DatasetName, ModelName, TrainingJobName
from slipstream_server.rpc.adapters.convert import DIGEST_PREFIX, STATES, gate_of
from slipstream_server.rpc.request_context import caller
from slipstream_server.storage.artifact_manifest import check_sha256
from slipstream_server.storage.request_records import RequestKey

MAX_TEXT_CHARS = 512
_STATES = {number: state for state, number in STATES.items()}


def request_key(method: str, request_id: str, request: Message) -> RequestKey | None:
    """None where the client asked for no idempotency."""
    if not request_id:
        return None
    serialized = request.SerializeToString(deterministic=True)
    return RequestKey.of(owner=caller(), method=method, request_id=request_id, request=serialized)


def settings_of(request: pb2.CreateAdapterRequest) -> AdapterSettings:
    if request.HasField("initialize"):
        raise UnsupportedField.of("initialize", "freshly initialised versions are not built yet; upload one")
    if request.HasField("initialization_seed"):
        raise InvalidField.of("initialization_seed", "needs initialize")
    adapter = request.adapter
    return AdapterSettings(
        display_name=adapter.display_name,
        description=adapter.description,
        base_model=check_base_name(adapter.base_model, "adapter.base_model"),
        labels=dict(adapter.labels),
    )


def changes_of(request: pb2.UpdateAdapterRequest) -> dict[str, object]:
    """The fields to change and their new values."""
    adapter = request.adapter
    for path in request.update_mask.paths:
        if path not in CHANGEABLE:
            raise InvalidField.of("update_mask", f"{path[:80]!a} cannot be changed; allowed: {', '.join(CHANGEABLE)}")
    paths = request.update_mask.paths or [name for name in CHANGEABLE if getattr(adapter, name)]
    return {path: dict(adapter.labels) if path == "labels" else getattr(adapter, path) for path in paths}


def states_of(request: pb2.ListAdapterVersionsRequest) -> frozenset[VersionState]:
    """The states asked for; all but retired where none is."""
    for state in request.states:
        if state not in _STATES:
            raise InvalidField.of("states", f"{state} is no state of a version")
    return frozenset(_STATES[state] for state in request.states) or frozenset(VersionState) - {VersionState.RETIRED}


def announced_files(header: pb2.UploadAdapterHeader) -> tuple[AnnouncedFile, ...]:
    return tuple(AnnouncedFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256) for file in header.files)


def chunk_of(request: pb2.UploadAdapterRequest) -> Chunk:
    if request.WhichOneof("content") != "chunk":
        raise InvalidField.of("content", "only the first message of an upload is a header; chunks follow")
    chunk = request.chunk
    return Chunk(file_index=chunk.file_index, offset_bytes=chunk.offset_bytes, data=chunk.data)


def details_of(header: pb2.UploadAdapterHeader) -> VersionDetails:
    """Provenance and figures of an upload; without provenance it is the caller's own."""
    provenance = header.provenance
    if not header.HasField("provenance"):
        provenance = pb2.Provenance(uploaded_by=caller())
    _check_provenance(provenance)
    text = json_format.MessageToJson(provenance, indent=None, sort_keys=True)
    return VersionDetails(provenance=text, metrics=dict(header.metrics))


def digest_of(text: str, field: str) -> str:
    """The 64 digits of "sha256:..."."""
    if not text.startswith(DIGEST_PREFIX):
        raise InvalidField.of(field, f"{text[:80]!a} does not begin with {DIGEST_PREFIX!r}")
    return check_sha256(text.removeprefix(DIGEST_PREFIX), field)


def text_of(text: str, field: str) -> str:
    """``text`` if it can stand in a version's provenance."""
    if len(text) > MAX_TEXT_CHARS or not text.isprintable():
        raise InvalidField.of(field, f"{text[:80]!a} is not at most {MAX_TEXT_CHARS} printable characters")
    return text


def model_id(text: str) -> str:
    return ModelName.parse(text if "/" in text else f"models/{text}", "model").model


def adapter_id(text: str, field: str) -> str:
    return parse_adapter_id(text, field)


def gate_use(request: pb2.SetAdapterAliasRequest) -> GateUse:
    return GateUse(gate=gate_of(request.gate) if request.HasField("gate") else None, override=request.override_gate)


def move_of(
    request: pb2.SetAdapterAliasRequest | pb2.RollBackAdapterAliasRequest | pb2.DeleteAdapterAliasRequest,
) -> Move:
    return Move(
        by=caller(),
        comment="" if isinstance(request, pb2.DeleteAdapterAliasRequest) else request.comment,
        expected_generation=request.expected_generation if request.HasField("expected_generation") else None,
    )


def _check_provenance(provenance: pb2.Provenance) -> None:
    if provenance.training_job:
        TrainingJobName.parse(provenance.training_job, "header.provenance.training_job")
    if provenance.dataset:
        DatasetName.parse(provenance.dataset, "header.provenance.dataset")
    if provenance.step < 0:
        raise InvalidField.of("header.provenance.step", f"{provenance.step} is below 0")
    for field, value in provenance.ListFields():
        if isinstance(value, str):
            text_of(value, f"header.provenance.{field.name}")
