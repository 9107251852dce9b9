"""What callers see of the training service, made from rows: datasets, jobs and checkpoints.

Frozen values; pure functions. Knows no gRPC.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import msgspec

from slipstream_server.training.specification import JobPlan, JobSpec
from slipstream_server.training.states import DatasetState, JobState
from slipstream_server.training.tables import CheckpointRow, DatasetRow, JobRow

TRAIN_SPLIT = "train"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why something failed: ``reason`` is an ErrorReason without its prefix."""

    reason: str
    message: str
    metadata: dict[str, str] = {}


class FileOfDataset(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    size_bytes: int
    sha256: str
    split: str


class LocatedError(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a row, and where the row is. ``reason`` is a RowErrorReason."""

    split: str
    path: str
    line: int
    field: str
    reason: str
    message: str


class SplitCount(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_rows: int
    num_invalid_rows: int


class DatasetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What reading a dataset's rows found: counts over all of it, the first errors in full."""

    row_format: str
    splits: tuple[SplitCount, ...]
    errors: tuple[LocatedError, ...]
    error_counts: dict[str, int]

    @property
    def num_rows(self) -> int:
        return sum(split.num_rows for split in self.splits)

    @property
    def num_invalid_rows(self) -> int:
        return sum(split.num_invalid_rows for split in self.splits)

    @property
    def is_valid(self) -> bool:
        return not self.error_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A stored dataset; an empty ``id`` is one that was only checked. ``report`` is None until its rows are read."""

    id: str
    display_name: str
    labels: Mapping[str, str]
    state: DatasetState
    problem: Problem | None
    files: tuple[FileOfDataset, ...]
    report: DatasetReport | None
    wanted_format: str
    artifact: str
    digest: str
    size_bytes: int
    source: str
    owner: str
    create_time: datetime
    update_time: datetime
    etag: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far training has come; None where it is not known yet."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    num_trained_tokens: int = 0
    tokens_per_second: float | None = None
    remaining_s: float | None = None


class AliasOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the alias a job asked for: it ``moved`` to ``generation``, or why not."""

    alias: str
    moved: bool
    generation: int = 0
    problem: Problem | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished job brought. ``version`` and ``alias`` are filled in while it is published."""

    step: int
    metrics: dict[str, float]
    baseline_metrics: dict[str, float]
    train_loss: float | None
    num_tokens: int
    run_s: float
    num_train_rows: int
    num_evaluation_rows: int
    num_truncated_rows: int
    num_trainable_parameters: int
    package_versions: dict[str, str]
    version: str = ""
    version_digest: str = ""
    alias: AliasOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it is stored. ``queue_position`` counts from 1; 0: it does not wait."""

    id: str
    display_name: str
    labels: Mapping[str, str]
    spec: JobSpec
    plan: JobPlan | None
    state: JobState
    state_message: str
    problem: Problem | None
    progress: Progress | None
    outcome: Outcome | None
    num_attempts: int
    queue_position: int
    last_sequence: int
    owner: str
    create_time: datetime
    update_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint of a job."""

    job: str
    step: int
    epoch: float
    size_bytes: int
    metrics: Mapping[str, float]
    create_time: datetime


def dataset_of(row: DatasetRow) -> Dataset:
    problem = Problem(reason=row.error_reason, message=row.error_message) if row.error_reason else None
    return Dataset(
        id=row.id,
        display_name=row.display_name,
        labels=json.loads(row.labels_json),
        state=DatasetState(row.state),
        problem=problem,
        files=msgspec.json.decode(row.files_json, type=tuple[FileOfDataset, ...]),
        report=msgspec.json.decode(row.report_json, type=DatasetReport) if row.report_json else None,
        wanted_format=row.wanted_format,
        artifact=row.artifact,
        digest=row.digest,
        size_bytes=row.size_bytes,
        source=row.source,
        owner=row.owner,
        create_time=row.create_time,
        update_time=row.update_time,
        etag=str(row.generation),
    )


def job_of(row: JobRow, queue_position: int = 0) -> Job:
    return Job(
        id=row.id,
        display_name=row.display_name,
        labels=json.loads(row.labels_json),
        spec=spec_of(row),
        plan=msgspec.json.decode(row.plan_json, type=JobPlan) if row.plan_json else None,
        state=JobState(row.state),
        state_message=row.state_message,
        problem=msgspec.json.decode(row.error_json, type=Problem) if row.error_json else None,
        progress=progress_of(row),
        outcome=outcome_of(row),
        num_attempts=row.attempt,
        queue_position=queue_position,
        last_sequence=row.last_sequence,
        owner=row.owner,
        create_time=row.create_time,
        update_time=row.update_time,
        start_time=row.start_time,
        end_time=row.end_time,
        etag=str(row.generation),
    )


def spec_of(row: JobRow) -> JobSpec:
    return msgspec.json.decode(row.spec_json, type=JobSpec)


def plan_of(row: JobRow) -> JobPlan:
    """The plan of a job that has passed its validation."""
    return msgspec.json.decode(row.plan_json, type=JobPlan)


def progress_of(row: JobRow) -> Progress | None:
    return msgspec.json.decode(row.progress_json, type=Progress) if row.progress_json else None


def outcome_of(row: JobRow) -> Outcome | None:
    return msgspec.json.decode(row.outcome_json, type=Outcome) if row.outcome_json else None


def checkpoint_of(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        job=row.job,
        step=row.step,
        epoch=row.epoch,
        size_bytes=row.size_bytes,
        metrics=json.loads(row.metrics_json),
        create_time=row.create_time,
    )


def as_json(value: object) -> str:
    """``value`` as a JSON column holds it."""
    return msgspec.json.encode(value, order="sorted").decode()
