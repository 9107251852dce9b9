"""The front follows a real registry: what it was told is in force before the registry hears that it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from tests.conftest import Eventually
from tests.rpc.adapters_kit import AdapterClient, adapter_service
from tests.unit.adapters.lora_files import lora_files

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream_server.errors import AdapterNotFound
from slipstream_server.inference.registry_copy import AliasMoved, RegistryCopy
from slipstream_server.resource_names import AdapterAliasName, AdapterVersionName
from slipstream_server.rpc.channels import Peer, open_channel
from slipstream_server.rpc.inference.registry_watch import RegistryWatch


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[AdapterClient]:
    async with adapter_service(tmp_path) as client:
        yield client


@asynccontextmanager
async def following(port: int, copy: RegistryCopy, *, silence_s: float = 35.0) -> AsyncIterator[asyncio.Task[None]]:
    async with open_channel(Peer(address=f"127.0.0.1:{port}")) as channel:
        task = asyncio.create_task(RegistryWatch(channel, copy, "front-1", silence_s=silence_s).run())
        try:
            async with asyncio.timeout(10):
                while not copy.is_filled:
                    await asyncio.sleep(0.005)
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_every_confirmed_change_is_in_force(registry: AdapterClient) -> None:
    first = await registry.upload("support")
    await registry.set_alias("support@live", "v1")
    copy = RegistryCopy()
    async with following(registry.port, copy):
        found = copy.find("support")
        assert (str(found.name), f"sha256:{found.digest}") == (first.name, first.digest)
        assert [(file.path, file.sha256) for file in found.files] == [(file.path, file.sha256) for file in first.files]
        await registry.upload("support", lora_files(seed=1))
        for version in ("v2", "v1") * 10:
            moved = await registry.set_alias("support@live", version)
            assert (list(moved.unconfirmed_replicas), copy.find("support").name.version) == ([], version)
        await registry.stub.SetActiveAdapter(pb2.SetActiveAdapterRequest(model="tiny", adapter="support"))
        assert copy.default_of("tiny") == "support"
        await registry.stub.DisableAdapters(pb2.DisableAdaptersRequest(model="tiny"))
        assert copy.default_of("tiny") == ""
        await registry.stub.RollBackAdapterAlias(pb2.RollBackAdapterAliasRequest(name="support@live"))
        assert copy.find("support").name.version == "v2"


async def test_deletions_are_heard(registry: AdapterClient, assert_eventually: Eventually) -> None:
    await registry.upload("support")
    copy = RegistryCopy()
    async with following(registry.port, copy):
        copy.find("support@v1")
        await registry.stub.DeleteAdapter(pb2.DeleteAdapterRequest(name="support", force=True))

        def is_gone() -> bool:
            try:
                copy.find("support@v1")
            except AdapterNotFound:
                return True
            return False

        await assert_eventually(is_gone)


async def test_a_copy_that_missed_something_takes_a_snapshot(
    registry: AdapterClient, assert_eventually: Eventually
) -> None:
    """A gap before an event, a number of the registry's future, and a stream that another one has taken over."""
    await registry.upload("support")
    await registry.set_alias("support@live", "v1")
    copy = RegistryCopy()
    async with following(registry.port, copy) as task:
        copy.sequence -= 1
        await registry.upload("support", lora_files(seed=1))
        await assert_eventually(lambda: copy.sequence == 4 and copy.find("support@v2"))
        wrong = AliasMoved(AdapterAliasName("support", "live"), AdapterVersionName("support", "v9"))
        copy.apply([(5, wrong), (6, wrong)])
        async for _ in _takeover(registry):
            break
        await assert_eventually(lambda: copy.sequence == 4 and copy.find("support").name.version == "v1")
        assert not task.done()
        assert not (await registry.set_alias("support@live", "v2")).unconfirmed_replicas


async def _takeover(registry: AdapterClient) -> AsyncIterator[pb2.WatchAdaptersResponse]:
    call = registry.stub.WatchAdapters(pb2.WatchAdaptersRequest(resolver_id="front-1"))
    try:
        async for response in call:
            yield response
    finally:
        call.cancel()


async def test_a_silent_stream_is_opened_anew(registry: AdapterClient, assert_eventually: Eventually) -> None:
    """Silence longer than heartbeats allow: the new stream goes on where the old one was."""
    copy = RegistryCopy()
    async with following(registry.port, copy, silence_s=0.05):
        watches = registry.registry.resolvers._watches
        first = watches["front-1"]
        await assert_eventually(lambda: watches.get("front-1", first) is not first)
        await registry.upload("support")
        await assert_eventually(lambda: copy.sequence == 2 and copy.find("support@v1"))
