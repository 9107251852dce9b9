"""Datasets, the rows to train on: ``client.datasets``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Unpack

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream.training.v1 import dataset_service_pb2_grpc
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.errors import InvalidRequestError
from slipstream_client.models import Progress
from slipstream_client.options import CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import Failure, plain
from slipstream_client.spelling import message_of, number_of
from slipstream_client.transfers import TRANSFER_TIMEOUT_S, LocalFile, OnProgress, announce, chunks

SERVICE = "training"
BUSY_STATES = frozenset({"importing", "validating"})
POLL_S = 0.2
MAX_POLL_S = 2.0

Data = str | Path | bytes
"""A file, or the bytes of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSplit:
    """A part of a dataset; ``row_count`` includes the rows that cannot be trained on."""

    name: str
    row_count: int
    invalid_row_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Something wrong with a row. ``line_number`` counts from 1, 0: the file as a whole; ``field`` empty: the row
    as a whole.
    """

    split: str
    path: str
    line_number: int
    field: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowErrorCount:
    """How often one kind of error occurs in all splits."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows, stored. ``state``: importing, validating, ready, invalid (see ``row_errors``) or failed (see ``error``).

    ``row_errors`` are the first 100, and are left out of lists; ``name`` is empty where it was only validated.
    """

    name: str
    display_name: str
    state: str
    state_message: str
    error: Failure | None
    progress: Progress | None
    format: str
    splits: tuple[DatasetSplit, ...]
    row_count: int
    invalid_row_count: int
    row_errors: tuple[RowError, ...]
    error_counts: tuple[RowErrorCount, ...]
    field_names: tuple[str, ...]
    field_mapping: Mapping[str, str]
    class_labels: tuple[str, ...]
    size_bytes: int
    digest: str
    source: str
    revision: str
    labels: Mapping[str, str]
    owner: str
    create_time: datetime | None
    update_time: datetime | None
    etag: str

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewToken:
    """A token of a row; ``in_loss``: the model is to learn to write it."""

    token_id: int
    text: str
    in_loss: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRow:
    """One row as a job would see it; without a base model, or with ``errors``, it has no tokens."""

    row_index: int
    fields: Mapping[str, Any]
    rendered_text: str
    tokens: tuple[PreviewToken, ...]
    truncated: bool
    errors: tuple[RowError, ...]
    line_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """How long rows are, in tokens."""

    row_count: int
    min_tokens: int
    median_tokens: int
    p95_tokens: int
    max_tokens: int
    truncated_row_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPreview:
    """Rows as a job would see them. ``row_count`` is that of the split."""

    rows: tuple[PreviewRow, ...]
    row_count: int
    token_statistics: TokenStatistics | None


class Datasets:
    """Uploading, reading and deleting datasets. Names are ids (``desk``) or resource names (``datasets/desk``)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> dataset_service_pb2_grpc.DatasetServiceAsyncStub:
        """The raw stub."""
        return dataset_service_pb2_grpc.DatasetServiceStub(self._connection.channel(SERVICE))

    async def upload(
        self,
        data: Data | Mapping[str, Data],
        dataset_id: str = "",
        *,
        display_name: str = "",
        format: str = "",  # noqa: A002 - the contract's name
        field_mapping: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
        on_progress: OnProgress | None = None,
        **call: Unpack[CallOptions],
    ) -> Dataset:
        """Upload a file, or one for each split ({"train": ..., "validation": ...}); bytes are taken for JSON Lines.

        The files are read twice: the contract wants every hash before the first byte. The answer is still
        validating; ``wait`` for it. A repeat after a lost connection does not make a second dataset.
        """
        header = message_of(
            dataset_pb2.UploadDatasetHeader,
            "header",
            {
                "dataset_id": dataset_id,
                "display_name": display_name,
                "format": format,
                "field_mapping": field_mapping,
                "labels": labels,
                "validate_only": validate_only,
            },
        )
        call["request_id"] = header.request_id = checked_request_id(call.get("request_id"))
        call["timeout_s"] = call.get("timeout_s") or TRANSFER_TIMEOUT_S
        splits = data if isinstance(data, Mapping) else {"": data}
        files = [_local_file(split, content, place) for place, (split, content) in enumerate(splits.items())]
        announced = await announce(files, on_progress)
        header.files.extend(
            dataset_pb2.DatasetFile(file=said, split=split) for split, said in zip(splits, announced, strict=True)
        )

        async def messages() -> AsyncGenerator[dataset_pb2.UploadDatasetRequest]:
            yield dataset_pb2.UploadDatasetRequest(header=header)
            async for chunk in chunks(files, announced, on_progress):
                yield dataset_pb2.UploadDatasetRequest(chunk=chunk)

        return plain(Dataset, await self._connection.upload(SERVICE, self.stub.UploadDataset, messages, **call))

    async def wait(
        self, name: str, *, on_change: Callable[[Dataset], None] | None = None, **call: Unpack[CallOptions]
    ) -> Dataset:
        """The dataset once its rows are read: ready, invalid or failed. Each look at it goes to ``on_change``."""
        delay_s = POLL_S
        while True:
            dataset = await self.get(name, **call)
            if on_change is not None:
                on_change(dataset)
            if dataset.state not in BUSY_STATES:
                return dataset
            await asyncio.sleep(delay_s)
            delay_s = min(MAX_POLL_S, delay_s * 1.5)

    async def get(self, name: str, **call: Unpack[CallOptions]) -> Dataset:
        """One dataset. Raises NotFoundError."""
        request = dataset_pb2.GetDatasetRequest(name=name)
        return plain(Dataset, await self._connection.unary(SERVICE, self.stub.GetDataset, request, **call))

    async def list(
        self, *, states: Sequence[str] = (), limit: int | None = None, **call: Unpack[CallOptions]
    ) -> list[Dataset]:
        """Every dataset, newest first; with ``states`` only those in one of them."""
        kind = dataset_pb2.Dataset.State.DESCRIPTOR
        request = dataset_pb2.ListDatasetsRequest(states=[number_of(kind, "states", state) for state in states])
        return await all_pages(
            self._connection,
            SERVICE,
            self.stub.ListDatasets,
            request,
            lambda page: [plain(Dataset, dataset) for dataset in page.datasets],
            limit=limit,
            **call,
        )

    async def delete(self, name: str, *, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Delete a dataset. Raises FailedPreconditionError while a job uses it."""
        request = dataset_pb2.DeleteDatasetRequest(name=name, etag=etag)
        await self._connection.unary(SERVICE, self.stub.DeleteDataset, request, **call)

    async def preview(
        self,
        name: str,
        *,
        base_model: str = "",
        split: str = "",
        start_row: int = 0,
        row_count: int | None = None,
        max_length_tokens: int | None = None,
        train_on_prompt: bool = False,
        **call: Unpack[CallOptions],
    ) -> DatasetPreview:
        """Rows as a job would train on them; with ``base_model`` as tokens, and with the mask of what is learned."""
        request = message_of(
            dataset_pb2.PreviewDatasetRequest,
            "",
            {
                "name": name,
                "split": split,
                "start_row": start_row,
                "page_size": row_count,
                "base_model": base_model,
                "max_length_tokens": max_length_tokens,
                "train_on_prompt": train_on_prompt,
            },
        )
        answer = await self._connection.unary(SERVICE, self.stub.PreviewDataset, request, **call)
        return plain(DatasetPreview, answer)


def _local_file(split: str, data: Data, place: int) -> LocalFile:
    if isinstance(data, bytes):
        return LocalFile(path=f"{split or 'train'}.jsonl", data=data)
    path = Path(data)
    if not path.name:
        raise InvalidRequestError.of("files", f"{str(data)!r} is not a file")
    # Two splits may come from files of the same name in different folders.
    return LocalFile(path=path.name if place == 0 else f"{split}/{path.name}", data=path)
