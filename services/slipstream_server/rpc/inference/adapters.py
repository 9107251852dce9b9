"""Adapters for the front, put together: the registry's copy and whoever keeps it, files fetched by DownloadAdapter, and
the check that an adapter fits the model it is asked for. Event loop; the check runs in threads.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream_server.adapters.fitting import ServingBase, check_fit
from slipstream_server.config import Settings
from slipstream_server.errors import AdapterVersionNotFound, CorruptArtifact, DependencyUnavailable, WrongState
from slipstream_server.inference.adapter_store import AdapterStore, FileChunk
from slipstream_server.inference.registry_copy import RegistryCopy, ServableVersion
from slipstream_server.inference.resolver import AdapterResolver
from slipstream_server.models.catalogue import HubSource, builtin_catalogue
from slipstream_server.models.hub import parse_hub_id
from slipstream_server.resource_names import new_id
from slipstream_server.rpc.channels import Peer, open_channel
from slipstream_server.rpc.inference.registry_watch import DIGEST_PREFIX, SERVABLE, RegistryWatch, version_of
from slipstream_server.rpc.status import error_of_status

_MAX_CHECKS_KEPT = 4096
_LOOK_UP_TIMEOUT_S = 2.0

BaseOf = Callable[[str], ServingBase]
"""The base behind a model's name; raises ModelNotFound."""


@dataclass(frozen=True, slots=True)
class FrontAdapters:
    """What the front needs: ``resolve`` for requests, ``watch`` to run for as long as the service does."""

    resolve: AdapterResolver
    watch: RegistryWatch


@asynccontextmanager
async def front_adapters(peer: Peer, root: Path, base_of: BaseOf) -> AsyncIterator[FrontAdapters]:
    """Adapters from the registry at ``peer``, their files kept below ``root``. Works while the registry is away."""
    async with open_channel(peer) as channel:
        copy, registry = RegistryCopy(), Registry(channel)
        store = AdapterStore(root, registry.fetch)
        await asyncio.to_thread(store.tidy)
        try:
            yield FrontAdapters(
                resolve=AdapterResolver(copy, store, look_up=registry.look_up, check_fit=FitChecks(base_of).check),
                watch=RegistryWatch(channel, copy, new_id("inference")),
            )
        finally:
            await store.close()


def registry_peer(settings: Settings) -> Peer | None:
    """Where the registry is; None where neither an address nor a port is set."""
    config = settings.inference
    if config.adapters_address is None and not settings.port_of("adapters"):
        return None
    return Peer(
        address=config.adapters_address or settings.address_of("adapters"),
        tls_ca=config.adapters_tls_ca or settings.common.tls_cert,
        token_file=config.adapters_token_file or settings.common.token_file,
    )


def known_as(spec: str) -> frozenset[str]:
    """The portable names of the model that an operator called ``spec``: its catalogue name, its hub ids."""
    catalogue = builtin_catalogue()
    if spec in catalogue:
        sources = catalogue.get(spec).sources
        return frozenset({spec, *(source.repository for source in sources if isinstance(source, HubSource))})
    hub_id = None if Path(spec).exists() else parse_hub_id(spec)
    return frozenset() if hub_id is None else frozenset({hub_id[0]})


class Registry:
    """What the front asks the registry for beside following it: files by digest, and versions that it does not know."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: adapter_grpc.AdapterServiceAsyncStub = adapter_grpc.AdapterServiceStub(channel)

    async def look_up(self, reference: str) -> ServableVersion:
        """The version that ``reference`` means to the registry now.

        Raises what it answers with, AdapterVersionNotFound where it was deleted, WrongState where it is not ready.
        """
        request = pb2.GetAdapterVersionRequest(name=reference)
        try:
            async with asyncio.timeout(_LOOK_UP_TIMEOUT_S):
                version = await self._stub.GetAdapterVersion(request)
        except TimeoutError:
            raise DependencyUnavailable("the adapter registry does not answer") from None
        except grpc.aio.AioRpcError as rpc_error:
            raise error_of_status(rpc_error) from None
        if version.state == pb2.AdapterVersion.STATE_RETIRED:
            raise AdapterVersionNotFound(f"{version.name} was deleted", metadata={"version": version.name})
        if version.state not in SERVABLE:
            state = pb2.AdapterVersion.State.Name(version.state).removeprefix("STATE_")
            raise WrongState(f"{version.name} is {state} and cannot be served", metadata={"state": state})
        return version_of(version)

    async def fetch(self, version: ServableVersion) -> AsyncGenerator[FileChunk, None]:
        """The chunks of the version's files; raises what the registry answers with."""
        call = self._stub.DownloadAdapter(pb2.DownloadAdapterRequest(digest=f"{DIGEST_PREFIX}{version.digest}"))
        paths: list[str] = []
        try:
            async for response in call:
                if response.HasField("header"):
                    paths = [file.path for file in response.header.version.files]
                    continue
                chunk = response.chunk
                if not 0 <= chunk.file_index < len(paths):
                    raise CorruptArtifact(f"{version.name}: a chunk of no announced file came")
                yield FileChunk(paths[chunk.file_index], chunk.offset_bytes, chunk.data)
        except grpc.aio.AioRpcError as rpc_error:
            raise error_of_status(rpc_error) from None
        finally:
            call.cancel()


class FitChecks:
    """Remembers which adapters were found to fit which model folder."""

    def __init__(self, base_of: BaseOf) -> None:
        self._base_of = base_of
        self._fitting: OrderedDict[tuple[str, str, ServingBase], None] = OrderedDict()

    async def check(self, model: str, version: ServableVersion, folder: Path) -> None:
        """Raises IncompatibleAdapter, CorruptArtifact, UnsafeWeights, ModelNotFound."""
        base = self._base_of(model)
        key = (version.digest, version.base_model, base)
        if key not in self._fitting:
            await asyncio.to_thread(check_fit, folder, version.base_model, base)
            self._fitting[key] = None
            if len(self._fitting) > _MAX_CHECKS_KEPT:
                self._fitting.popitem(last=False)
