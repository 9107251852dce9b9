"""The two streams of files: an upload into the registry, a download out of it. Event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.type.v1 import artifact_pb2
from slipstream_server.adapters.intake import BaseModel, Chunk, Intake, check_base_name
from slipstream_server.adapters.references import Reference
from slipstream_server.adapters.resources import Version
from slipstream_server.adapters.versions import VersionDetails, Versions
from slipstream_server.errors import CorruptArtifact, InvalidField, NotFound, WrongState
from slipstream_server.rpc.adapters import requests
from slipstream_server.rpc.adapters.convert import version_message
from slipstream_server.rpc.request_context import caller
from slipstream_server.storage.artifacts import ArtifactStore


class Uploads:
    """Takes UploadAdapter's messages and registers what they bring."""

    def __init__(self, intake: Intake, versions: Versions) -> None:
        self._intake = intake
        self._versions = versions

    async def run(self, messages: AsyncIterator[pb2.UploadAdapterRequest]) -> pb2.AdapterVersion:
        """The version that the upload made, or found."""
        header = await _header(messages)
        adapter = requests.adapter_id(header.adapter, "header.adapter")
        key = requests.request_key("UploadAdapter", header.request_id, header)
        details = requests.details_of(header)
        files = requests.announced_files(header)
        self._intake.check_announced(files)
        if key is not None and not header.validate_only and (known := await self._versions.repeated(key)) is not None:
            return version_message(known)
        expected = await self._versions.expected_base(adapter, may_be_missing=header.create_missing)
        base = BaseModel(
            said=check_base_name(header.base_model, "header.base_model"),
            said_revision=requests.text_of(header.base_model_revision, "header.base_model_revision"),
            expected=expected,
        )
        if base.said:
            base.chosen("")
        if header.validate_only:
            return _announced(header, base, details)
        received = await self._intake.receive(files, _chunks(messages), base)
        version = await self._versions.register(
            caller(), adapter, received, details, create_missing=header.create_missing, key=key
        )
        return version_message(version)


class Downloads:
    """Answers DownloadAdapter from the store."""

    def __init__(self, store: ArtifactStore, versions: Versions) -> None:
        self._store = store
        self._versions = versions

    async def run(self, request: pb2.DownloadAdapterRequest) -> AsyncGenerator[pb2.DownloadAdapterResponse, None]:
        """The header, then the chunks of every file that the caller does not have."""
        version = await self._version(request)
        if not version.digest or version.state in ("retired", "failed"):
            raise WrongState(f"{version.name} is {version.state} and has no files", metadata={"state": version.state})
        header = pb2.DownloadAdapterHeader(version=version_message(version))
        yield pb2.DownloadAdapterResponse(header=header)
        for index, file in enumerate(version.files):
            if file.path in request.skipped_paths:
                continue
            async with aclosing(self._chunks(version, index, file.path)) as chunks:
                async for chunk in chunks:
                    yield pb2.DownloadAdapterResponse(chunk=chunk)

    async def _version(self, request: pb2.DownloadAdapterRequest) -> Version:
        match request.WhichOneof("which"):
            case "name":
                return await self._versions.get(Reference.parse(request.name, "name"))
            case "digest":
                return await self._versions.by_digest(requests.digest_of(request.digest, "digest"))
            case _:
                raise InvalidField.of("which", "name or digest is needed")

    async def _chunks(
        self, version: Version, index: int, path: str
    ) -> AsyncGenerator[artifact_pb2.ArtifactChunk, None]:
        offset = 0
        try:
            async with aclosing(self._store.read(version.digest, path)) as chunks:
                async for data in chunks:
                    yield artifact_pb2.ArtifactChunk(file_index=index, offset_bytes=offset, data=data)
                    offset += len(data)
        except NotFound:
            raise CorruptArtifact(f"the files of {version.name} are missing in the store") from None


async def _header(messages: AsyncIterator[pb2.UploadAdapterRequest]) -> pb2.UploadAdapterHeader:
    first = await anext(messages, None)
    if first is None or first.WhichOneof("content") != "header":
        raise InvalidField.of("header", "must be the first message of an upload")
    return first.header


async def _chunks(messages: AsyncIterator[pb2.UploadAdapterRequest]) -> AsyncIterator[Chunk]:
    async for message in messages:
        yield requests.chunk_of(message)


def _announced(header: pb2.UploadAdapterHeader, base: BaseModel, details: VersionDetails) -> pb2.AdapterVersion:
    """What a header that was only checked announces: a version without a name."""
    return pb2.AdapterVersion(
        files=header.files,
        size_bytes=sum(file.size_bytes for file in header.files),
        base_model=base.said or base.expected,
        base_model_revision=base.said_revision,
        metrics=details.metrics,
        provenance=header.provenance,
    )
