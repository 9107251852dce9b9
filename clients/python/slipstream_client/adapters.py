"""The registry of adapters: ``client.adapters``, with ``client.adapters.versions`` and ``client.adapters.aliases``.

Adapters are named by id (``support``) or resource name; versions and aliases also in short (``support@v3``,
``support@live``).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Unpack

from slipstream.adapters.v1 import adapter_service_pb2 as adapter_pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc
from slipstream_client.adapter_files import files_to_send, present_paths, receive
from slipstream_client.adapter_results import (
    ActiveChange,
    Adapter,
    AdapterVersion,
)
from slipstream_client.adapter_versions import SERVICE, AdapterAliases, AdapterVersions
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.options import CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import plain
from slipstream_client.spelling import message_of
from slipstream_client.training_options import LoraOptions
from slipstream_client.transfers import TRANSFER_TIMEOUT_S, OnProgress, announce, chunks


class Adapters:
    """Adapters, their files, and what a model applies by default."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> adapter_service_pb2_grpc.AdapterServiceAsyncStub:
        """The raw stub."""
        return adapter_service_pb2_grpc.AdapterServiceStub(self._connection.channel(SERVICE))

    @property
    def versions(self) -> AdapterVersions:
        return AdapterVersions(self._connection)

    @property
    def aliases(self) -> AdapterAliases:
        return AdapterAliases(self._connection)

    async def create(
        self,
        adapter_id: str,
        *,
        display_name: str = "",
        description: str = "",
        base_model: str = "",
        labels: Mapping[str, str] | None = None,
        initialize: LoraOptions | None = None,
        initialization_seed: int | None = None,
        validate_only: bool = False,
        **call: Unpack[CallOptions],
    ) -> Adapter:
        """Make an adapter; with ``initialize`` also its version v1, freshly initialised in that shape."""
        about = {"display_name": display_name, "description": description, "base_model": base_model, "labels": labels}
        values = {
            "adapter_id": adapter_id,
            "adapter": about,
            "initialize": initialize,
            "initialization_seed": initialization_seed,
            "validate_only": validate_only,
        }
        request = message_of(adapter_pb2.CreateAdapterRequest, "", values)
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return plain(Adapter, await self._connection.unary(SERVICE, self.stub.CreateAdapter, request, **call))

    async def get(self, name: str, **call: Unpack[CallOptions]) -> Adapter:
        """One adapter. Raises NotFoundError."""
        request = adapter_pb2.GetAdapterRequest(name=name)
        return plain(Adapter, await self._connection.unary(SERVICE, self.stub.GetAdapter, request, **call))

    async def list(self, *, base_model: str = "", **call: Unpack[CallOptions]) -> list[Adapter]:
        """Every adapter, by name; with ``base_model`` only those of this base."""
        return await all_pages(
            self._connection,
            SERVICE,
            self.stub.ListAdapters,
            adapter_pb2.ListAdaptersRequest(base_model=base_model),
            lambda page: [plain(Adapter, adapter) for adapter in page.adapters],
            **call,
        )

    async def delete(self, name: str, *, force: bool = False, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Delete an adapter, with ``force`` its versions and aliases too. Running requests finish."""
        request = adapter_pb2.DeleteAdapterRequest(name=name, force=force, etag=etag)
        await self._connection.unary(SERVICE, self.stub.DeleteAdapter, request, **call)

    async def upload(
        self,
        adapter: str,
        folder: str | Path,
        *,
        create_missing: bool = True,
        base_model: str = "",
        base_model_revision: str = "",
        metrics: Mapping[str, float] | None = None,
        validate_only: bool = False,
        on_progress: OnProgress | None = None,
        **call: Unpack[CallOptions],
    ) -> AdapterVersion:
        """Register the adapter that PEFT saved in ``folder`` as the next version.

        Only adapter_config.json and adapter_model.safetensors are sent. A repeat after a lost connection does not make
        a second version; the same files again are the version they already are.
        """
        values = {
            "adapter": adapter,
            "create_missing": create_missing,
            "base_model": base_model,
            "base_model_revision": base_model_revision,
            "metrics": metrics,
            "validate_only": validate_only,
        }
        header = message_of(adapter_pb2.UploadAdapterHeader, "header", values)
        call["request_id"] = header.request_id = checked_request_id(call.get("request_id"))
        call["timeout_s"] = call.get("timeout_s") or TRANSFER_TIMEOUT_S
        files = files_to_send(Path(folder))
        announced = await announce(files, on_progress)
        header.files.extend(announced)

        async def messages() -> AsyncGenerator[adapter_pb2.UploadAdapterRequest]:
            yield adapter_pb2.UploadAdapterRequest(header=header)
            if not validate_only:
                async for chunk in chunks(files, announced, on_progress):
                    yield adapter_pb2.UploadAdapterRequest(chunk=chunk)

        return plain(AdapterVersion, await self._connection.upload(SERVICE, self.stub.UploadAdapter, messages, **call))

    async def download(
        self,
        name: str,
        folder: str | Path,
        *,
        on_progress: OnProgress | None = None,
        **call: Unpack[CallOptions],
    ) -> AdapterVersion:
        """Fetch a version's files into ``folder``, as PEFT reads them, and check their hashes; returns the version.

        Files that are there already, whole, are not sent again. Each file appears whole and checked, or not at all.
        """
        place = Path(folder)
        call["timeout_s"] = call.get("timeout_s") or TRANSFER_TIMEOUT_S
        version = await self.versions.get(name, **call)
        skipped = await present_paths(place, version.files)
        # By its own name: an alias might have moved since.
        request = adapter_pb2.DownloadAdapterRequest(name=version.name, skipped_paths=skipped)
        responses = self._connection.stream(
            SERVICE, self.stub.DownloadAdapter, request, is_answer=lambda response: True, **call
        )
        async with aclosing(responses):
            await receive(responses, place, skipped, on_progress)
        return version

    async def set_active(
        self, model: str, adapter: str, *, expected_generation: int | None = None, **call: Unpack[CallOptions]
    ) -> ActiveChange:
        """Set the adapter that ``model`` applies where a request names none; empty: none. An alias is followed."""
        values = {"model": model, "adapter": adapter, "expected_generation": expected_generation}
        request = message_of(adapter_pb2.SetActiveAdapterRequest, "", values)
        return plain(ActiveChange, await self._connection.unary(SERVICE, self.stub.SetActiveAdapter, request, **call))

    async def disable(self, model: str, **call: Unpack[CallOptions]) -> ActiveChange:
        """Let ``model`` answer with its base weights where a request names no adapter."""
        request = adapter_pb2.DisableAdaptersRequest(model=model)
        return plain(ActiveChange, await self._connection.unary(SERVICE, self.stub.DisableAdapters, request, **call))

    async def enable(self, model: str, **call: Unpack[CallOptions]) -> ActiveChange:
        """Take ``disable`` back."""
        request = adapter_pb2.EnableAdaptersRequest(model=model)
        return plain(ActiveChange, await self._connection.unary(SERVICE, self.stub.EnableAdapters, request, **call))
