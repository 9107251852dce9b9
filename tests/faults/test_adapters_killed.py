"""The adapter service, killed (-9) at random while it takes uploads and moves an alias: old state or new state.

Every client keeps what it was told; after each restart that must be there, whole, and what was cut off must be there
whole or not at all.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.rpc.adapters_kit import chunk_messages, header_message
from tests.unit.adapters.lora_files import WEIGHTS, lora_files

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream_server.adapters.housekeeping import Housekeeping
from slipstream_server.rpc.adapters.app import open_database, opened_store
from slipstream_server.storage.database import DatabaseConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_KILLS = 10
NUM_UPLOADERS = 3
START_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Told:
    """What the clients were told, over all lives of the service."""

    digests: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    generation: int = 0
    target: str = ""
    cut_seeds: list[int] = field(default_factory=list)
    next_seed: int = 0


@asynccontextmanager
async def service(data_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """A process of the service and a stub for it; killed at the end if it still runs."""
    arguments = ["-m", "slipstream_server.cli", "adapters", "--data-dir", str(data_dir), "--base-port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=_environment(),
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            assert process.stdout is not None
            line = (await process.stdout.readline()).decode().split()
        assert line[:2] == ["adapters", "SERVING"], line
        async with grpc.aio.insecure_channel(line[2]) as channel:
            yield process, adapter_grpc.AdapterServiceStub(channel)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SLIPSTREAM_")}


async def test_ten_kills_leave_no_half_state(tmp_path: Path) -> None:
    told, dice = Told(), random.Random(1)
    for _ in range(NUM_KILLS):
        async with service(tmp_path) as (process, stub):
            await check_everything(stub, told)
            clients = [asyncio.create_task(upload_for_ever(stub, told)) for _ in range(NUM_UPLOADERS)]
            clients.append(asyncio.create_task(move_for_ever(stub, told)))
            await asyncio.sleep(dice.uniform(0.05, 1.5))
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await asyncio.wait(clients, timeout=30)
            assert all(client.done() and client.exception() is None for client in clients)
    assert len(told.digests) > NUM_KILLS
    assert told.generation > NUM_KILLS
    async with service(tmp_path) as (_, stub):
        await check_everything(stub, told)
        await repeat_what_was_cut(stub, told)
        await check_everything(stub, told)
        digests = await referenced_digests(stub)
    await check_store(tmp_path / "adapters", digests)


async def upload_for_ever(stub: Any, told: Told) -> None:
    """New adapters, one after another, until the service dies."""
    while True:
        seed = told.next_seed = told.next_seed + 1
        try:
            version = await upload(stub, seed)
        except grpc.aio.AioRpcError as error:
            raise_unless_dead(error)
            told.cut_seeds.append(seed)
            return
        remember(told, seed, version)


async def upload(stub: Any, seed: int) -> pb2.AdapterVersion:
    files = lora_files(seed)
    header = header_message("support", files, create_missing=True, request_id=f"seed-{seed}")
    return await stub.UploadAdapter(iter([header, *chunk_messages(files, 200)]))


def raise_unless_dead(error: grpc.aio.AioRpcError) -> None:
    """Only the death of the service may end a client."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        raise error


def remember(told: Told, seed: int, version: pb2.AdapterVersion) -> None:
    assert told.digests.setdefault(version.name, version.digest) == version.digest
    assert told.seeds.setdefault(version.name, seed) == seed


async def move_for_ever(stub: Any, told: Told) -> None:
    """Moves the alias to versions there are, by compare-and-set, and now and then back."""
    dice = random.Random(told.generation)
    while True:
        try:
            if not told.digests:
                await stub.ListAdapters(pb2.ListAdaptersRequest())
                continue
            alias = await move(stub, told, dice)
        except grpc.aio.AioRpcError as error:
            raise_unless_dead(error)
            return
        assert alias.generation == told.generation + 1
        told.generation, told.target = alias.generation, alias.version


async def move(stub: Any, told: Told, dice: random.Random) -> pb2.AdapterAlias:
    read = await current_alias(stub)
    if read is not None:
        # A move that was cut off may have been made: it is read here, and the next one builds on it.
        assert read.generation in (told.generation, told.generation + 1)
        told.generation, told.target = read.generation, read.version
    if told.generation and read is not None and read.history and dice.random() < 0.3:
        other = [change for change in read.history if change.version != read.version]
        if other:
            back = pb2.RollBackAdapterAliasRequest(name="support@live", expected_generation=told.generation)
            return (await stub.RollBackAdapterAlias(back)).alias
    request = pb2.SetAdapterAliasRequest(
        name="support@live", version=dice.choice(sorted(told.digests)), expected_generation=told.generation
    )
    return (await stub.SetAdapterAlias(request)).alias


async def current_alias(stub: Any) -> pb2.AdapterAlias | None:
    try:
        return await stub.GetAdapterAlias(pb2.GetAdapterAliasRequest(name="support@live"))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        raise


async def check_everything(stub: Any, told: Told) -> None:
    versions = await all_versions(stub)
    for name, digest in told.digests.items():
        assert versions[name].digest == digest
    # Numbers without gaps: a version that was not finished took none.
    assert sorted(int(name.rpartition("/v")[2]) for name in versions) == list(range(1, len(versions) + 1))
    for name, version in versions.items():
        assert version.state == pb2.AdapterVersion.STATE_REGISTERED
        await check_files(stub, name, told.seeds.get(name))
    alias = await current_alias(stub)
    assert (alias is not None) or told.generation == 0
    if alias is not None:
        assert alias.generation in (told.generation, told.generation + 1)
        assert alias.generation != told.generation or alias.version == told.target
        assert alias.version in versions
    await check_events(stub, versions, alias)


async def check_files(stub: Any, name: str, seed: int | None) -> None:
    """The service checks the hash of what it sends; here it is compared with what was sent to it."""
    weights = b""
    async for message in stub.DownloadAdapter(
        pb2.DownloadAdapterRequest(name=name, skipped_paths=["adapter_config.json"])
    ):
        weights += message.chunk.data
    assert seed is None or weights == lora_files(seed)[WEIGHTS]


async def check_events(stub: Any, versions: dict[str, pb2.AdapterVersion], alias: pb2.AdapterAlias | None) -> None:
    """The history tells exactly what there is: from 1 without gaps, each version once, each generation once."""
    if not versions:
        return
    call = stub.WatchAdapters(pb2.WatchAdaptersRequest())
    last = (await call.read()).snapshot.sequence
    call.cancel()
    call = stub.WatchAdapters(pb2.WatchAdaptersRequest(after_sequence=1))
    events: list[Any] = []
    while len(events) < last - 1:
        events += (await call.read()).events.events
    call.cancel()
    assert [event.sequence for event in events] == list(range(2, last + 1))
    made = [event.version_changed.name for event in events if event.HasField("version_changed")]
    assert sorted(made) == sorted(versions)
    moves = [event.alias_changed for event in events if event.HasField("alias_changed")]
    assert [move.generation for move in moves] == list(range(1, len(moves) + 1))
    assert (moves[-1] if moves else None) == alias


async def repeat_what_was_cut(stub: Any, told: Told) -> None:
    """With its request_id, an upload of which nothing was heard is made once, whether it had been made or not."""
    for seed in told.cut_seeds:
        remember(told, seed, await upload(stub, seed))
    assert len(set(told.seeds.values())) == len(told.seeds) == told.next_seed


async def all_versions(stub: Any) -> dict[str, pb2.AdapterVersion]:
    if not (await stub.ListAdapters(pb2.ListAdaptersRequest())).adapters:
        return {}
    listed = await stub.ListAdapterVersions(pb2.ListAdapterVersionsRequest(parent="support", page_size=1000))
    return {version.name: version for version in listed.adapter_versions}


async def referenced_digests(stub: Any) -> set[str]:
    return {version.digest.removeprefix("sha256:") for version in (await all_versions(stub)).values()}


async def check_store(folder: Path, digests: set[str]) -> None:
    """What the killed processes left behind is collected; what versions refer to stays, and is whole."""
    config = DatabaseConfig.sqlite(folder / "adapters.db")
    async with open_database(config) as database, opened_store(None, folder) as store:
        assert digests <= set(await store.digests())
        await Housekeeping(database, store).round(grace=timedelta(0))
        assert set(await store.digests()) == digests
        assert not list(store.place.staging.iterdir())
        for digest in digests:
            await store.verify(digest)
