"""AdapterService: converts, asks the registry, converts back. Event loop; no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream_server.adapters.active import ActiveAdapters
from slipstream_server.adapters.adapters import Adapters
from slipstream_server.adapters.aliases import Aliases
from slipstream_server.adapters.journal import Entry
from slipstream_server.adapters.references import Reference, number_of, parse_alias, parse_version
from slipstream_server.adapters.resolvers import Resolvers
from slipstream_server.adapters.versions import Versions
from slipstream_server.adapters.watching import Watching
from slipstream_server.errors import FencedOut, Unimplemented
from slipstream_server.resource_names import AdapterName, check_id
from slipstream_server.rpc.adapters import convert, requests
from slipstream_server.rpc.adapters.files import Downloads, Uploads
from slipstream_server.rpc.request_context import caller

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """The rooms behind the service."""

    adapters: Adapters
    versions: Versions
    aliases: Aliases
    active: ActiveAdapters
    watching: Watching
    resolvers: Resolvers
    uploads: Uploads
    downloads: Downloads
    acknowledge_timeout_s: float = 5.0


class AdapterServicer(adapter_grpc.AdapterServiceServicer):
    """Every method of the contract but ImportAdapter and MergeAdapters."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    # Adapters

    async def CreateAdapter(self, request: pb2.CreateAdapterRequest, context: Context) -> pb2.Adapter:
        adapter_id = check_id(request.adapter_id, "adapter_id")
        settings = requests.settings_of(request)
        if request.validate_only:
            await self._registry.adapters.check_creation(adapter_id)
            return pb2.Adapter(
                name=str(AdapterName(adapter_id)),
                display_name=settings.display_name,
                description=settings.description,
                base_model=settings.base_model,
                labels=settings.labels,
            )
        key = requests.request_key("CreateAdapter", request.request_id, request)
        adapter = await self._registry.adapters.create(caller(), adapter_id, settings, key=key)
        return convert.adapter_message(adapter)

    async def GetAdapter(self, request: pb2.GetAdapterRequest, context: Context) -> pb2.Adapter:
        adapter_id = requests.adapter_id(request.name, "name")
        return convert.adapter_message(await self._registry.adapters.get(adapter_id))

    async def ListAdapters(self, request: pb2.ListAdaptersRequest, context: Context) -> pb2.ListAdaptersResponse:
        page = await self._registry.adapters.list(request.base_model, request.page_size, request.page_token)
        return pb2.ListAdaptersResponse(
            adapters=[convert.adapter_message(adapter) for adapter in page.items],
            next_page_token=page.next_page_token,
        )

    async def UpdateAdapter(self, request: pb2.UpdateAdapterRequest, context: Context) -> pb2.Adapter:
        adapter_id = requests.adapter_id(request.adapter.name, "adapter.name")
        changes = requests.changes_of(request)
        return convert.adapter_message(await self._registry.adapters.update(adapter_id, changes, request.adapter.etag))

    async def DeleteAdapter(self, request: pb2.DeleteAdapterRequest, context: Context) -> Empty:
        adapter_id = requests.adapter_id(request.name, "name")
        await self._unconfirmed(await self._registry.adapters.delete(adapter_id, request.etag, force=request.force))
        return Empty()

    # Versions

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[pb2.UploadAdapterRequest], context: Context
    ) -> pb2.AdapterVersion:
        return await self._registry.uploads.run(request_iterator)

    async def DownloadAdapter(
        self, request: pb2.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[pb2.DownloadAdapterResponse]:
        async with aclosing(self._registry.downloads.run(request)) as responses:
            async for response in responses:
                yield response

    async def GetAdapterVersion(self, request: pb2.GetAdapterVersionRequest, context: Context) -> pb2.AdapterVersion:
        return convert.version_message(await self._registry.versions.get(Reference.parse(request.name, "name")))

    async def ListAdapterVersions(
        self, request: pb2.ListAdapterVersionsRequest, context: Context
    ) -> pb2.ListAdapterVersionsResponse:
        adapter_id = requests.adapter_id(request.parent, "parent")
        page = await self._registry.versions.list(
            adapter_id, requests.states_of(request), request.page_size, request.page_token
        )
        return pb2.ListAdapterVersionsResponse(
            adapter_versions=[convert.version_message(version) for version in page.items],
            next_page_token=page.next_page_token,
        )

    async def DeleteAdapterVersion(self, request: pb2.DeleteAdapterVersionRequest, context: Context) -> Empty:
        name = parse_version(request.name, "name")
        await self._registry.versions.retire(name.adapter, number_of(name), request.etag)
        return Empty()

    async def ImportAdapter(self, request: pb2.ImportAdapterRequest, context: Context) -> pb2.AdapterVersion:
        raise Unimplemented("ImportAdapter is part of the contract, but not built yet; upload the files")

    async def MergeAdapters(self, request: pb2.MergeAdaptersRequest, context: Context) -> pb2.AdapterVersion:
        raise Unimplemented("MergeAdapters is part of the contract, but not built yet")

    # Aliases

    async def GetAdapterAlias(self, request: pb2.GetAdapterAliasRequest, context: Context) -> pb2.AdapterAlias:
        return convert.alias_message(await self._registry.aliases.get(parse_alias(request.name, "name")))

    async def ListAdapterAliases(
        self, request: pb2.ListAdapterAliasesRequest, context: Context
    ) -> pb2.ListAdapterAliasesResponse:
        adapter_id = requests.adapter_id(request.parent, "parent")
        page = await self._registry.aliases.list(adapter_id, request.page_size, request.page_token)
        return pb2.ListAdapterAliasesResponse(
            adapter_aliases=[convert.alias_message(alias) for alias in page.items],
            next_page_token=page.next_page_token,
        )

    async def SetAdapterAlias(
        self, request: pb2.SetAdapterAliasRequest, context: Context
    ) -> pb2.SetAdapterAliasResponse:
        name = parse_alias(request.name, "name")
        target = Reference.within(name.adapter, request.version, "version")
        move, gate = requests.move_of(request), requests.gate_use(request)
        if request.validate_only:
            alias = await self._registry.aliases.check(name, target, move, gate)
            return pb2.SetAdapterAliasResponse(alias=convert.alias_message(alias) if alias else None)
        key = requests.request_key("SetAdapterAlias", request.request_id, request)
        entry = await self._registry.aliases.set(name, target, move, gate, key=key)
        return pb2.SetAdapterAliasResponse(
            alias=convert.change_of(entry).alias_changed, unconfirmed_replicas=await self._unconfirmed(entry)
        )

    async def RollBackAdapterAlias(
        self, request: pb2.RollBackAdapterAliasRequest, context: Context
    ) -> pb2.RollBackAdapterAliasResponse:
        name = parse_alias(request.name, "name")
        target = request.target_generation if request.HasField("target_generation") else None
        key = requests.request_key("RollBackAdapterAlias", request.request_id, request)
        entry = await self._registry.aliases.roll_back(name, target, requests.move_of(request), key=key)
        return pb2.RollBackAdapterAliasResponse(
            alias=convert.change_of(entry).alias_changed, unconfirmed_replicas=await self._unconfirmed(entry)
        )

    async def DeleteAdapterAlias(self, request: pb2.DeleteAdapterAliasRequest, context: Context) -> Empty:
        name = parse_alias(request.name, "name")
        await self._unconfirmed(await self._registry.aliases.delete(name, requests.move_of(request)))
        return Empty()

    # Watching

    async def WatchAdapters(
        self, request: pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb2.WatchAdaptersResponse]:
        if not request.resolver_id:
            async with aclosing(self._registry.watching.follow(request.after_sequence, asyncio.Event())) as onlooker:
                async for news in onlooker:
                    yield convert.watch_response(news, "")
            return
        resolver_id = check_id(request.resolver_id, "resolver_id")
        # Alive before it reads: an event is either in what it reads first, or waits for its acknowledgement.
        with self._registry.resolvers.watching(resolver_id) as watch:
            async with aclosing(self._registry.watching.follow(request.after_sequence, watch.replaced)) as stream:
                async for news in stream:
                    watch.sent = max(watch.sent, news.sequence)
                    yield convert.watch_response(news, watch.watch_id)
        raise FencedOut(f"resolver_id: a newer stream of {resolver_id!r} has taken over")

    async def AcknowledgeAdapterEvents(
        self, request: pb2.AcknowledgeAdapterEventsRequest, context: Context
    ) -> pb2.AcknowledgeAdapterEventsResponse:
        resolver_id = check_id(request.resolver_id, "resolver_id")
        acknowledged = self._registry.resolvers.acknowledge(resolver_id, request.watch_id, request.sequence)
        return pb2.AcknowledgeAdapterEventsResponse(acknowledged_sequence=acknowledged)

    # A model's default

    async def SetActiveAdapter(
        self, request: pb2.SetActiveAdapterRequest, context: Context
    ) -> pb2.SetActiveAdapterResponse:
        model = requests.model_id(request.model)
        reference = Reference.parse(request.adapter, "adapter") if request.adapter else None
        expected = request.expected_generation if request.HasField("expected_generation") else None
        entry = await self._registry.active.set(caller(), model, request.adapter, reference, expected)
        return pb2.SetActiveAdapterResponse(
            active_adapter=convert.change_of(entry).active_adapter_changed,
            unconfirmed_replicas=await self._unconfirmed(entry),
        )

    async def DisableAdapters(
        self, request: pb2.DisableAdaptersRequest, context: Context
    ) -> pb2.DisableAdaptersResponse:
        entry = await self._registry.active.disable(caller(), requests.model_id(request.model))
        return pb2.DisableAdaptersResponse(
            active_adapter=convert.change_of(entry).active_adapter_changed,
            unconfirmed_replicas=await self._unconfirmed(entry),
        )

    async def EnableAdapters(self, request: pb2.EnableAdaptersRequest, context: Context) -> pb2.EnableAdaptersResponse:
        entry = await self._registry.active.enable(caller(), requests.model_id(request.model))
        return pb2.EnableAdaptersResponse(
            active_adapter=convert.change_of(entry).active_adapter_changed,
            unconfirmed_replicas=await self._unconfirmed(entry),
        )

    async def _unconfirmed(self, entry: Entry) -> tuple[str, ...]:
        return await self._registry.resolvers.confirmed(entry.sequence, self._registry.acknowledge_timeout_s)
