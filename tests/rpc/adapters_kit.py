"""A running adapter service over real gRPC, and the calls that its tests make again and again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.unit.adapters.lora_files import lora_files, sha256

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream.type.v1 import artifact_pb2
from slipstream_server.config import ListenConfig
from slipstream_server.rpc.adapters.app import mount, open_database, open_registry, opened_store
from slipstream_server.rpc.adapters.servicer import Registry
from slipstream_server.rpc.server import open_server
from slipstream_server.storage.artifacts import ArtifactStore
from slipstream_server.storage.database import Database, DatabaseConfig


@dataclass(frozen=True, slots=True)
class AdapterClient:
    """A stub and shorthands."""

    stub: Any
    port: int
    registry: Registry
    database: Database
    store: ArtifactStore

    async def upload(
        self, adapter: str, files: Mapping[str, bytes] | None = None, *, chunk_bytes: int = 1000, **header: Any
    ) -> pb2.AdapterVersion:
        chosen = lora_files() if files is None else files
        header.setdefault("create_missing", True)
        messages = [header_message(adapter, chosen, **header), *chunk_messages(chosen, chunk_bytes)]
        return await self.stub.UploadAdapter(iter(messages))

    async def set_alias(self, name: str, version: str, **fields: Any) -> pb2.SetAdapterAliasResponse:
        return await self.stub.SetAdapterAlias(pb2.SetAdapterAliasRequest(name=name, version=version, **fields))

    async def download(self, **which: Any) -> tuple[pb2.AdapterVersion, dict[str, bytes]]:
        version, files = pb2.AdapterVersion(), {}
        async for response in self.stub.DownloadAdapter(pb2.DownloadAdapterRequest(**which)):
            if response.HasField("header"):
                version = response.header.version
            else:
                path = version.files[response.chunk.file_index].path
                assert response.chunk.offset_bytes == len(files.get(path, b""))
                files[path] = files.get(path, b"") + response.chunk.data
        return version, files


def header_message(adapter: str, files: Mapping[str, bytes], **fields: Any) -> pb2.UploadAdapterRequest:
    announced = fields.pop("announced", None) or [
        artifact_pb2.ArtifactFile(path=path, size_bytes=len(data), sha256=sha256(data)) for path, data in files.items()
    ]
    return pb2.UploadAdapterRequest(header=pb2.UploadAdapterHeader(adapter=adapter, files=announced, **fields))


def chunk_messages(files: Mapping[str, bytes], chunk_bytes: int = 1000) -> Iterator[pb2.UploadAdapterRequest]:
    for index, data in enumerate(files.values()):
        for offset in range(0, len(data), chunk_bytes):
            chunk = artifact_pb2.ArtifactChunk(
                file_index=index, offset_bytes=offset, data=data[offset : offset + chunk_bytes]
            )
            yield pb2.UploadAdapterRequest(chunk=chunk)


@asynccontextmanager
async def adapter_service(
    folder: Path, *, dsn: str | None = None, acknowledge_timeout_s: float = 5.0, port: int = 0
) -> AsyncIterator[AdapterClient]:
    config = DatabaseConfig(dsn=dsn) if dsn else DatabaseConfig.sqlite(folder / "adapters.db")
    async with open_database(config) as database, opened_store(None, folder) as store:
        registry = open_registry(database, store, acknowledge_timeout_s)
        async with open_server([mount(registry)], ListenConfig(port=port)) as server:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stub = adapter_grpc.AdapterServiceStub(channel)
                yield AdapterClient(stub, server.port, registry, database, store)


async def failure(call: Any) -> tuple[grpc.StatusCode, str, str, dict[str, str]]:
    """Code, reason, message and metadata of the error that ``call`` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return explained(caught.value)


def explained(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, str, dict[str, str]]:
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        detail.Unpack(info)
    return error.code(), info.reason, error.details() or "", dict(info.metadata)


async def refused(call: Any) -> tuple[str, str]:
    """Code and reason in one glance."""
    code, reason, _, _ = await failure(call)
    return code.name, reason


def names(adapters: Sequence[Any]) -> list[str]:
    return [adapter.name for adapter in adapters]


def config_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(files["adapter_config.json"])
    return values
