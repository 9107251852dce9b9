"""DatasetService: converts, asks the room, converts back. Event loop; no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from slipstream.training.v1 import dataset_service_pb2 as pb2
from slipstream.training.v1 import dataset_service_pb2_grpc as dataset_grpc
from slipstream_server.errors import InvalidDataset, InvalidField, Unimplemented, UnsupportedField, WrongState
from slipstream_server.rpc.request_context import caller
from slipstream_server.rpc.training import requests
from slipstream_server.rpc.training.dataset_convert import dataset_message, fill_report, preview_message
from slipstream_server.training.base_models import BaseModels
from slipstream_server.training.checking import Checking
from slipstream_server.training.dataset_intake import Chunk, DatasetIntake
from slipstream_server.training.dataset_rows import chosen_split
from slipstream_server.training.datasets import Datasets
from slipstream_server.training.model_tokenizer import ModelTokenizer
from slipstream_server.training.preview import preview_rows
from slipstream_server.training.resources import Dataset
from slipstream_server.training.rows import RowLimits
from slipstream_server.training.states import DatasetState

Context = grpc.aio.ServicerContext[Any, Any]

_SETTLE_S = 2.0
_DEFAULT_ROWS, _MAX_ROWS = 10, 100
_MAX_LENGTH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRooms:
    """The rooms behind the service."""

    datasets: Datasets
    intake: DatasetIntake
    checking: Checking
    models: BaseModels


class DatasetServicer(dataset_grpc.DatasetServiceServicer):
    """Every method of the contract but ImportDataset."""

    def __init__(self, rooms: DatasetRooms) -> None:
        self._rooms = rooms

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb2.UploadDatasetRequest], context: Context
    ) -> pb2.Dataset:
        header = await _header(request_iterator)
        details, files = requests.dataset_details(header), requests.announced_files(header)
        key = requests.request_key("UploadDataset", header.request_id, header)
        self._rooms.intake.check_announced(files)
        if header.validate_only:
            # No row refers to what is stored for the check, so the collector takes it away.
            artifact = await self._rooms.intake.receive(files, _chunks(request_iterator))
            report = await self._rooms.datasets.report(artifact, files, details.wanted_format)
            state = pb2.Dataset.STATE_READY if report.is_valid else pb2.Dataset.STATE_INVALID
            message = pb2.Dataset(display_name=details.display_name, labels=details.labels, state=state)
            message.size_bytes = artifact.manifest.total_bytes
            fill_report(message, report)
            return message
        if key is not None and (known := await self._rooms.datasets.repeated(key)) is not None:
            return dataset_message(known)
        await self._rooms.datasets.check_new(header.dataset_id)
        artifact = await self._rooms.intake.receive(files, _chunks(request_iterator))
        added = await self._rooms.datasets.add(caller(), header.dataset_id, artifact, files, details, key=key)
        # Small ones are read by then; of a large one the answer is that it is being read.
        await self._rooms.checking.settled(f"datasets/{added.id}", _SETTLE_S)
        return dataset_message(await self._rooms.datasets.get(caller(), added.id))

    async def ImportDataset(self, request: pb2.ImportDatasetRequest, context: Context) -> pb2.Dataset:
        raise Unimplemented("ImportDataset is part of the contract, but not built yet; upload the files")

    async def GetDataset(self, request: pb2.GetDatasetRequest, context: Context) -> pb2.Dataset:
        return dataset_message(await self._rooms.datasets.get(caller(), requests.dataset_id(request.name)))

    async def ListDatasets(self, request: pb2.ListDatasetsRequest, context: Context) -> pb2.ListDatasetsResponse:
        states = requests.dataset_states(request)
        page = await self._rooms.datasets.list(caller(), states, request.page_size, request.page_token)
        return pb2.ListDatasetsResponse(
            datasets=[dataset_message(dataset, with_row_errors=False) for dataset in page.items],
            next_page_token=page.next_page_token,
        )

    async def DeleteDataset(self, request: pb2.DeleteDatasetRequest, context: Context) -> Empty:
        await self._rooms.datasets.delete(caller(), requests.dataset_id(request.name), request.etag)
        return Empty()

    async def PreviewDataset(self, request: pb2.PreviewDatasetRequest, context: Context) -> pb2.PreviewDatasetResponse:
        dataset = await self._rooms.datasets.get(caller(), requests.dataset_id(request.name))
        counts = _split_counts(dataset)
        if request.train_on_prompt:
            raise UnsupportedField.of("train_on_prompt", "this build learns the answers only")
        split = chosen_split(list(counts), request.split, "split") or next(iter(counts))
        num_rows = _in_range("page_size", request.page_size, 0, _MAX_ROWS) or _DEFAULT_ROWS
        start_row = _in_range("start_row", request.start_row, 0, RowLimits().max_rows)
        tokenizer, max_length = await self._tokenizer(request)
        folder = await self._rooms.datasets.folder(dataset)
        preview = await asyncio.to_thread(
            preview_rows,
            folder,
            dataset.files,
            split,
            start_row=start_row,
            num_rows=num_rows,
            tokenizer=tokenizer,
            max_length=max_length,
        )
        return preview_message(preview, num_rows=counts[split], has_tokens=tokenizer is not None)

    async def _tokenizer(self, request: pb2.PreviewDatasetRequest) -> tuple[ModelTokenizer | None, int]:
        """The tokenizer of the model that was asked for, and the length at which rows are cut."""
        given = request.max_length_tokens if request.HasField("max_length_tokens") else None
        if given is not None:
            _in_range("max_length_tokens", given, 1, _MAX_LENGTH)
        if not request.base_model:
            return None, given or _MAX_LENGTH
        base = await asyncio.to_thread(self._rooms.models.resolve, request.base_model, field="base_model")
        tokenizer = await asyncio.to_thread(base.tokenizer)
        return tokenizer, given or base.facts.context_tokens or _MAX_LENGTH


async def _header(messages: AsyncIterator[pb2.UploadDatasetRequest]) -> pb2.UploadDatasetHeader:
    first = await anext(messages, None)
    if first is None or first.WhichOneof("content") != "header":
        raise InvalidField.of("header", "must be the first message of an upload")
    return first.header


async def _chunks(messages: AsyncIterator[pb2.UploadDatasetRequest]) -> AsyncIterator[Chunk]:
    async for message in messages:
        yield requests.chunk_of(message)


def _split_counts(dataset: Dataset) -> dict[str, int]:
    if dataset.state is DatasetState.FAILED:
        raise InvalidDataset(f"datasets/{dataset.id} could not be read")
    if dataset.report is None:
        text = f"datasets/{dataset.id} is still being read"
        raise WrongState(text, metadata={"state": dataset.state.upper()}, retry_after_s=1.0)
    return {split.name: split.num_rows for split in dataset.report.splits}


def _in_range(field: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise InvalidField.of(field, f"{value} is not from {least} to {most}")
    return value
