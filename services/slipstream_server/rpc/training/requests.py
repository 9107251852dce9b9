"""Requests of the training service in the words of its room. Pure functions; a bad field is InvalidField."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.resource_names import CheckpointName, DatasetName, TrainingJobName, check_id, check_step
from slipstream_server.rpc.request_context import caller
from slipstream_server.rpc.training.enums import DATASET_STATES, FORMATS, JOB_STATES
from slipstream_server.storage.request_records import RequestKey
from slipstream_server.training.dataset_intake import Chunk
from slipstream_server.training.datasets import DatasetDetails
from slipstream_server.training.jobs import JobDetails
from slipstream_server.training.resources import TRAIN_SPLIT, FileOfDataset
from slipstream_server.training.rows import RowFormat
from slipstream_server.training.states import DatasetState, JobState

MAX_TITLE_CHARS = 200
MAX_LABELS = 64
MAX_GRACE_S = 600
DEFAULT_GRACE_S = 10

_JOB_STATES = {number: state for state, number in JOB_STATES.items()}
_DATASET_STATES = {number: state for state, number in DATASET_STATES.items()}
_FORMATS: dict[int, RowFormat] = {number: name for name, number in FORMATS.items()}


def request_key(method: str, request_id: str, request: Message) -> RequestKey | None:
    """None where the client asked for no idempotency."""
    if not request_id:
        return None
    serialized = request.SerializeToString(deterministic=True)
    return RequestKey.of(owner=caller(), method=method, request_id=request_id, request=serialized)


def job_id(name: str, field: str = "name") -> str:
    """The id in "trainingJobs/{job}" or a bare id."""
    return TrainingJobName.parse(name if "/" in name else f"trainingJobs/{name}", field).job


def dataset_id(name: str, field: str = "name") -> str:
    """The id in "datasets/{dataset}" or a bare id."""
    return DatasetName.parse(name if "/" in name else f"datasets/{name}", field).dataset


def job_details(request: pb2.CreateTrainingJobRequest) -> JobDetails:
    if request.training_job_id:
        check_id(request.training_job_id, "training_job_id")
    _check_title(request.display_name, "display_name")
    return JobDetails(
        id=request.training_job_id,
        display_name=request.display_name,
        labels=labels_of(request.labels, "labels"),
    )


def job_states(request: pb2.ListTrainingJobsRequest) -> frozenset[JobState]:
    for state in request.states:
        if state not in _JOB_STATES:
            raise InvalidField.of("states", f"{state} is no state of a job")
    return frozenset(_JOB_STATES[state] for state in request.states)


def grace_s(request: pb2.CancelTrainingJobRequest) -> int:
    """Whole seconds, rounded up."""
    if not request.HasField("grace"):
        return DEFAULT_GRACE_S
    grace = request.grace.ToTimedelta().total_seconds()
    if not 0 <= grace <= MAX_GRACE_S:
        raise InvalidField.of("grace", f"{grace:g} s is not from 0 to {MAX_GRACE_S}")
    return int(-(-grace // 1))


def checkpoint_step(request: pb2.ResumeTrainingJobRequest, job: str) -> int | None:
    """The step that is asked for by a checkpoint's name or number; None: the last one."""
    text = request.checkpoint
    if not text:
        return None
    if "/" not in text:
        return int(check_step(text, "checkpoint"))
    name = CheckpointName.parse(text, "checkpoint")
    if name.job != job:
        raise InvalidField.of("checkpoint", f"is one of trainingJobs/{name.job}; one of trainingJobs/{job} is needed")
    return int(name.step)


def dataset_details(header: dataset_pb2.UploadDatasetHeader) -> DatasetDetails:
    if header.dataset_id:
        check_id(header.dataset_id, "header.dataset_id")
    _check_title(header.display_name, "header.display_name")
    if header.field_mapping:
        raise UnsupportedField.of("header.field_mapping", "this build reads fields by their own names only")
    return DatasetDetails(
        display_name=header.display_name,
        labels=labels_of(header.labels, "header.labels"),
        wanted_format=wanted_format(header.format, "header.format"),
    )


def wanted_format(number: int, field: str) -> str:
    """The name of a format, empty where it is to be recognised."""
    if number == dataset_pb2.DATASET_FORMAT_UNSPECIFIED:
        return ""
    if number not in _FORMATS:
        known = ", ".join(dataset_pb2.DatasetFormat.Name(known) for known in FORMATS.values())
        raise UnsupportedField.of(field, f"this build reads {known}")
    return _FORMATS[number]


def announced_files(header: dataset_pb2.UploadDatasetHeader) -> tuple[FileOfDataset, ...]:
    return tuple(
        FileOfDataset(
            path=each.file.path,
            size_bytes=each.file.size_bytes,
            sha256=each.file.sha256,
            split=each.split or TRAIN_SPLIT,
        )
        for each in header.files
    )


def chunk_of(message: dataset_pb2.UploadDatasetRequest) -> Chunk:
    if message.WhichOneof("content") != "chunk":
        raise InvalidField.of("content", "only chunks follow the header")
    chunk = message.chunk
    return Chunk(file_index=chunk.file_index, offset_bytes=chunk.offset_bytes, data=chunk.data)


def dataset_states(request: dataset_pb2.ListDatasetsRequest) -> frozenset[DatasetState]:
    for state in request.states:
        if state not in _DATASET_STATES:
            raise InvalidField.of("states", f"{state} is no state of a dataset of this build")
    return frozenset(_DATASET_STATES[state] for state in request.states)


def labels_of(labels: Mapping[str, str], field: str) -> dict[str, str]:
    if len(labels) > MAX_LABELS:
        raise InvalidField.of(field, f"has {len(labels)} entries; at most {MAX_LABELS}")
    for key, value in labels.items():
        if not 1 <= len(key) <= 63 or len(value) > 255:
            raise InvalidField.of(field, "keys have 1 to 63 characters, values at most 255")
    return dict(labels)


def _check_title(title: str, field: str) -> None:
    if len(title) > MAX_TITLE_CHARS:
        raise InvalidField.of(field, f"has {len(title)} characters; at most {MAX_TITLE_CHARS}")
