"""The adapter service as jobs see it: an upload that may be repeated, and an alias to be moved. Event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import grpc

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream.type.v1 import artifact_pb2
from slipstream_server.errors import NotFound
from slipstream_server.resource_names import DatasetName, TrainingJobName
from slipstream_server.rpc.status import error_of_status
from slipstream_server.rpc.training.convert import with_perplexity
from slipstream_server.training.publishing import AdapterUpload, PublishedVersion
from slipstream_server.training.resources import AliasOutcome
from slipstream_server.training.specification import Publication

_CHUNK_BYTES = 1024 * 1024
_UPLOAD_TIMEOUT_S = 3600.0
_TIMEOUT_S = 60.0
_LOOK_UP_TIMEOUT_S = 2.0


class AdapterRegistry:
    """Calls of one adapter service over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: adapter_grpc.AdapterServiceAsyncStub = adapter_grpc.AdapterServiceStub(channel)

    async def base_of(self, adapter: str) -> str:
        """As ``Registry.base_of``."""
        try:
            request = pb2.GetAdapterRequest(name=f"adapters/{adapter}")
            return (await self._stub.GetAdapter(request, timeout=_LOOK_UP_TIMEOUT_S)).base_model
        except grpc.aio.AioRpcError as rpc_error:
            error = error_of_status(rpc_error)
        if isinstance(error, NotFound):
            return ""
        raise error

    async def upload(self, upload: AdapterUpload) -> PublishedVersion:
        """As ``Registry.upload``. Cancelling it cancels the call."""
        try:
            version = await self._stub.UploadAdapter(_messages(upload), timeout=_UPLOAD_TIMEOUT_S)
        except grpc.aio.AioRpcError as rpc_error:
            raise error_of_status(rpc_error) from None
        return PublishedVersion(version.name, version.digest)

    async def set_alias(self, publication: Publication, version: str, request_id: str) -> AliasOutcome:
        """As ``Registry.set_alias``."""
        name = f"adapters/{publication.adapter}/aliases/{publication.alias}"
        request = pb2.SetAdapterAliasRequest(
            name=name,
            version=version,
            expected_generation=publication.expected_alias_generation,
            comment="published by a training job",
            request_id=request_id,
        )
        try:
            response = await self._stub.SetAdapterAlias(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as rpc_error:
            raise error_of_status(rpc_error) from None
        return AliasOutcome(alias=name, moved=True, generation=response.alias.generation)


async def _messages(upload: AdapterUpload) -> AsyncIterator[pb2.UploadAdapterRequest]:
    yield pb2.UploadAdapterRequest(header=upload_header(upload))
    for index, file in enumerate(upload.files):
        offset = 0
        with await asyncio.to_thread(_open, upload.folder / file.name) as content:
            while data := await asyncio.to_thread(content.read, _CHUNK_BYTES):
                chunk = artifact_pb2.ArtifactChunk(file_index=index, offset_bytes=offset, data=data)
                yield pb2.UploadAdapterRequest(chunk=chunk)
                offset += len(data)


def upload_header(upload: AdapterUpload) -> pb2.UploadAdapterHeader:
    """The same for every repeat: all of it is in the job's row and the runner's result."""
    plan, outcome = upload.plan, upload.outcome
    return pb2.UploadAdapterHeader(
        adapter=f"adapters/{upload.adapter}",
        create_missing=True,
        files=[
            artifact_pb2.ArtifactFile(path=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in upload.files
        ],
        base_model=plan.base_model_name,
        base_model_revision=plan.base_model_revision,
        provenance=pb2.Provenance(
            training_job=str(TrainingJobName(upload.job)),
            dataset=str(DatasetName(upload.dataset)),
            dataset_digest=f"sha256:{plan.dataset_digest}",
            step=outcome.step,
            package_versions=outcome.package_versions,
        ),
        metrics=with_perplexity(outcome.metrics),
        request_id=upload.request_id,
    )


def _open(path: Path) -> BinaryIO:
    return path.open("rb")
