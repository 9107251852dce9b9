"""AdapterService over gRPC: following the registry, acknowledging it, and moving aliases from many places at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.rpc.adapters_kit import AdapterClient, adapter_service, explained, refused
from tests.unit.adapters.lora_files import lora_files

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream_server.adapters import housekeeping


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AdapterClient]:
    async with adapter_service(tmp_path) as client:
        yield client


@asynccontextmanager
async def watching(client: AdapterClient, resolver_id: str = "", after_sequence: int = 0) -> AsyncIterator[Any]:
    request = pb2.WatchAdaptersRequest(resolver_id=resolver_id, after_sequence=after_sequence)
    call = client.stub.WatchAdapters(request)
    try:
        yield call
    finally:
        call.cancel()


async def acknowledge(client: AdapterClient, resolver_id: str, watch_id: str, sequence: int) -> int:
    request = pb2.AcknowledgeAdapterEventsRequest(resolver_id=resolver_id, watch_id=watch_id, sequence=sequence)
    return int((await client.stub.AcknowledgeAdapterEvents(request)).acknowledged_sequence)


class Resolver:
    """What a front does: follows the registry, keeps a copy, and acknowledges once that is in force."""

    def __init__(self, client: AdapterClient, resolver_id: str) -> None:
        self.client, self.id = client, resolver_id
        self.versions: dict[str, str] = {}
        self.acknowledging = asyncio.Event()
        self.acknowledging.set()
        self.started = asyncio.Event()

    async def run(self) -> None:
        async with watching(self.client, self.id) as call:
            async for message in call:
                self._apply(message)
                await self.acknowledging.wait()
                sequence = message.snapshot.sequence or (
                    message.events.events[-1].sequence if message.events.events else 0
                )
                await acknowledge(self.client, self.id, message.watch_id, sequence)
                self.started.set()

    def _apply(self, message: pb2.WatchAdaptersResponse) -> None:
        if message.HasField("snapshot"):
            self.versions = {alias.name: alias.version for alias in message.snapshot.aliases}
        for event in message.events.events:
            if event.HasField("alias_changed"):
                self.versions[event.alias_changed.name] = event.alias_changed.version

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Resolver]:
        task = asyncio.create_task(self.run())
        try:
            await asyncio.wait_for(self.started.wait(), 10)
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await task


async def test_a_watch_begins_with_a_snapshot_and_goes_on_with_every_change(client: AdapterClient) -> None:
    version = await client.upload("support")
    await client.set_alias("support@live", "v1")
    await client.stub.SetActiveAdapter(pb2.SetActiveAdapterRequest(model="tiny", adapter="support@live"))
    async with watching(client) as call:
        snapshot = (await call.read()).snapshot
        # Adapter made, version registered, alias set, default set.
        assert snapshot.sequence == 4
        assert [found.name for found in snapshot.versions] == [version.name]
        assert snapshot.versions[0].aliases == ["live"]
        assert [(alias.name, alias.version) for alias in snapshot.aliases] == [
            ("adapters/support/aliases/live", version.name)
        ]
        assert [active.adapter for active in snapshot.active_adapters] == ["support@live"]
        await client.upload("support", lora_files(seed=1))
        moved = await client.set_alias("support@live", "v2")
        await client.stub.DeleteAdapterAlias(pb2.DeleteAdapterAliasRequest(name="support@live"))
        await client.stub.DeleteAdapterVersion(pb2.DeleteAdapterVersionRequest(name="support@v1"))
        await client.stub.UpdateAdapter(
            pb2.UpdateAdapterRequest(adapter=pb2.Adapter(name="adapters/support", description="d"))
        )
        await client.stub.DeleteAdapter(pb2.DeleteAdapterRequest(name="support", force=True))
        events: list[Any] = []
        while len(events) < 7:
            events += (await call.read()).events.events
    assert [event.sequence for event in events] == list(range(5, 12))
    assert [event.WhichOneof("change") for event in events] == [
        "version_changed", "alias_changed", "alias_deleted", "version_changed", "adapter_changed",
        "active_adapter_changed", "adapter_deleted",
    ]  # fmt: skip
    assert events[1].alias_changed == moved.alias
    assert events[3].version_changed.state == pb2.AdapterVersion.STATE_RETIRED
    assert (events[5].active_adapter_changed.adapter, events[5].active_adapter_changed.enabled) == ("", False)
    assert all(event.HasField("event_time") for event in events)


async def test_a_watch_resumes_where_it_was_or_starts_anew(
    client: AdapterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        await client.upload("support", lora_files(seed))
    async with watching(client, after_sequence=4) as call:
        assert (await call.read()).heartbeat.sequence == 4
        assert [event.sequence for event in (await call.read()).events.events] == [5, 6]
    async with watching(client, after_sequence=7) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert explained(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    await housekeeping.Housekeeping(client.database, client.store, kept_events=2).round()
    async with watching(client, after_sequence=3) as call:
        assert (await call.read()).snapshot.sequence == 6
    async with watching(client, after_sequence=4) as call:
        assert (await call.read()).HasField("heartbeat")
        assert [event.sequence for event in (await call.read()).events.events] == [5, 6]


async def test_a_quiet_watch_shows_that_it_lives(client: AdapterClient) -> None:
    client.registry.watching._heartbeat_s = 0.05
    await client.upload("support")
    async with watching(client, "front-a") as call:
        messages = [await call.read() for _ in range(3)]
    assert messages[0].HasField("snapshot")
    assert [message.heartbeat.sequence for message in messages[1:]] == [2, 2]
    assert len({message.watch_id for message in messages}) == 1
    assert messages[0].watch_id


async def test_a_move_waits_for_every_resolver(client: AdapterClient) -> None:
    for seed in range(2):
        await client.upload("support", lora_files(seed))
    await client.set_alias("support@live", "v1")
    async with (
        Resolver(client, "front-a").running() as a,
        Resolver(client, "front-b").running() as b,
        watching(client) as _,
    ):
        for turn in range(6):
            version = f"adapters/support/versions/v{1 + turn % 2}"
            moved = await client.set_alias("support@live", version)
            assert not moved.unconfirmed_replicas
            # Both have it in force when the call returns, and an onlooker is not waited for.
            assert a.versions == b.versions == {"adapters/support/aliases/live": version}
        b.acknowledging.clear()
        move = asyncio.create_task(client.set_alias("support@live", "v1"))
        await asyncio.wait({move}, timeout=0.3)
        assert not move.done()
        b.acknowledging.set()
        assert not (await move).unconfirmed_replicas


@pytest.mark.parametrize("what", ["alias", "adapter"])
async def test_a_deletion_waits_for_every_resolver(client: AdapterClient, what: str) -> None:
    await client.upload("support")
    await client.set_alias("support@live", "v1")
    async with Resolver(client, "front-a").running() as a:
        a.acknowledging.clear()
        if what == "alias":
            call = client.stub.DeleteAdapterAlias(pb2.DeleteAdapterAliasRequest(name="support@live"))
        else:
            call = client.stub.DeleteAdapter(pb2.DeleteAdapterRequest(name="support", force=True))
        deletion = asyncio.ensure_future(call)
        await asyncio.wait({deletion}, timeout=0.3)
        assert not deletion.done()
        a.acknowledging.set()
        await asyncio.wait_for(deletion, 3)


async def test_a_resolver_that_does_not_acknowledge_is_named(tmp_path: Path) -> None:
    async with adapter_service(tmp_path, acknowledge_timeout_s=0.4) as client:
        await client.upload("support")
        async with Resolver(client, "front-a").running(), Resolver(client, "front-b").running() as b:
            b.acknowledging.clear()
            start = time.monotonic()
            moved = await client.set_alias("support@live", "v1")
            assert moved.unconfirmed_replicas == ["front-b"]
            assert 0.4 <= time.monotonic() - start < 3
            disabled = await client.stub.DisableAdapters(pb2.DisableAdaptersRequest(model="tiny"))
            assert disabled.unconfirmed_replicas == ["front-b"]
            b.acknowledging.set()
            again = await client.stub.DisableAdapters(pb2.DisableAdaptersRequest(model="tiny"))
            assert not again.unconfirmed_replicas


async def test_a_resolver_that_leaves_meanwhile_is_named_and_not_waited_for(client: AdapterClient) -> None:
    await client.upload("support")
    async with watching(client, "front-a") as call:
        assert (await call.read()).HasField("snapshot")
        move = asyncio.create_task(client.set_alias("support@live", "v1"))
        assert (await call.read()).HasField("events")
    start = time.monotonic()
    assert (await move).unconfirmed_replicas == ["front-a"]
    assert time.monotonic() - start < 4


async def test_acknowledgements_belong_to_a_live_stream_and_to_what_it_sent(client: AdapterClient) -> None:
    await client.upload("support")
    wrong = ("FAILED_PRECONDITION", "WRONG_STATE")
    assert await refused(acknowledge(client, "front-a", "x", 1)) == wrong
    async with watching(client, "front-a") as first:
        first_id = (await first.read()).watch_id
        assert await acknowledge(client, "front-a", first_id, 2) == 2
        assert await acknowledge(client, "front-a", first_id, 1) == 2
        assert await refused(acknowledge(client, "front-a", first_id, 3)) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        async with watching(client, "front-a") as second:
            second_id = (await second.read()).watch_id
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while True:
                    await first.read()
            assert explained(caught.value)[:2] == (grpc.StatusCode.ABORTED, "FENCED_OUT")
            assert await refused(acknowledge(client, "front-a", first_id, 2)) == wrong
            assert await acknowledge(client, "front-a", second_id, 2) == 2
    bad = client.stub.WatchAdapters(pb2.WatchAdaptersRequest(resolver_id="../x"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bad.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_eight_clients_lose_no_update_of_one_alias(client: AdapterClient) -> None:
    for seed in range(8):
        await client.upload("support", lora_files(seed))
    await client.set_alias("support@live", "v1")
    won: list[tuple[int, str]] = []

    async def compete(number: int) -> None:
        for _ in range(5):
            while True:
                read = await client.stub.GetAdapterAlias(pb2.GetAdapterAliasRequest(name="support@live"))
                try:
                    moved = await client.set_alias("support@live", f"v{number}", expected_generation=read.generation)
                except grpc.aio.AioRpcError as error:
                    if explained(error)[1] != "STALE_GENERATION":
                        raise
                    continue
                assert moved.alias.generation == read.generation + 1
                won.append((moved.alias.generation, moved.alias.version))
                break

    await asyncio.gather(*(compete(number) for number in range(1, 9)))
    assert sorted(generation for generation, _ in won) == list(range(2, 42))
    async with watching(client, after_sequence=1) as call:
        await call.read()
        seen: list[tuple[int, str]] = []
        while len(seen) < 41:
            for event in (await call.read()).events.events:
                if event.HasField("alias_changed"):
                    seen.append((event.alias_changed.generation, event.alias_changed.version))
    assert seen[1:] == sorted(won)


async def test_twenty_watchers_that_reconnect_at_random_miss_and_repeat_nothing(client: AdapterClient) -> None:
    await client.upload("support")
    await client.upload("support", lora_files(seed=1))
    num_moves, first = 60, 3
    last = first + num_moves

    async def watch(seed: int) -> list[int]:
        dice = random.Random(seed)
        seen: list[int] = []
        while not seen or seen[-1] < last:
            async with watching(client, f"front-{seed}" if seed % 2 else "", seen[-1] if seen else first) as call:
                for _ in range(dice.randint(1, 6)):
                    message = await call.read()
                    seen += [event.sequence for event in message.events.events]
                    if message.watch_id and message.events.events and dice.random() < 0.5:
                        with suppress(grpc.aio.AioRpcError):
                            await acknowledge(client, f"front-{seed}", message.watch_id, seen[-1])
                    if seen and seen[-1] >= last:
                        break
        return seen

    async def move() -> None:
        name = pb2.GetAdapterAliasRequest(name="support@live")
        for turn in range(num_moves):
            request = pb2.SetAdapterAliasRequest(name=name.name, version=f"v{1 + turn % 2}")
            await client.stub.SetAdapterAlias(request)

    # Nobody waits here for resolvers that come and go.
    object.__setattr__(client.registry, "acknowledge_timeout_s", 0.01)
    *sequences, _ = await asyncio.gather(*(watch(seed) for seed in range(20)), move())
    for seen in sequences:
        assert seen == list(range(first + 1, last + 1))
