"""Adapters from a real registry to a real worker, over gRPC: which one answers, and what happens when things break."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tests.conftest import Eventually
from tests.rpc.adapter_front import BASE, Inference, Oracle, inference, publish, save_base, set_default
from tests.rpc.adapters_kit import AdapterClient, adapter_service, explained, failure, refused
from tests.unit.engine.adapter_folders import WEIGHTS

from slipstream.adapters.v1 import adapter_service_pb2 as pb2

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


def nth(adapter: str, number: int) -> str:
    return f"adapters/{adapter}/versions/v{number}"


V1, V2 = nth("support", 1), nth("support", 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def oracle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def registry_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def registry(registry_folder: Path) -> AsyncIterator[AdapterClient]:
    async with adapter_service(registry_folder) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(
    base: Path, registry: AdapterClient, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Inference]:
    async with inference(base, registry.port, tmp_path_factory.mktemp("cache")) as service:
        yield service


@pytest.fixture
def service(running: Inference) -> Iterator[Inference]:
    """One service for all tests; what a test puts before its resolver is taken away again."""
    resolver: Any = running.front._resolve_adapter
    yield running
    running.front.use_adapters(resolver)


_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """An adapter that no other test knows."""
    return f"support-{next(_numbers)}"


async def test_names_lead_to_versions_and_answers_are_those_of_the_version_alone(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle
) -> None:
    await publish(registry, oracle, 1, 2, adapter=name)
    await registry.set_alias(f"{name}@live", "v2")
    await registry.set_alias(f"{name}@candidate", "v1")
    v1, v2 = (nth(name, 1), 1), (nth(name, 2), 2)
    expected = {
        name: v2, f"{name}@live": v2, f"{name}@candidate": v1, f"{name}@v1": v1, v2[0]: v2,
        f"adapters/{name}/aliases/candidate": v1, "": ("", None),
    }  # fmt: skip
    # All at once: rows of different adapters and the base in the same batches.
    answers = await asyncio.gather(*[service.generate(name) for name in [*expected] * 3])
    for name, answer in zip([*expected] * 3, answers, strict=True):
        version, number = expected[name]
        assert answer == (version, oracle.alone(number)), name
    assert len({tuple(oracle.alone(number)) for number in (None, 1, 2)}) == 3


async def test_what_is_not_there_is_said_by_its_name(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle
) -> None:
    await publish(registry, oracle, 1, 2, adapter=name)
    await registry.set_alias(f"{name}@candidate", "v1")
    assert await refused(service.generate("nobody")) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert await refused(service.generate(f"{name}@v9")) == ("NOT_FOUND", "ADAPTER_VERSION_NOT_FOUND")
    assert await refused(service.generate(f"{name}@old")) == ("NOT_FOUND", "ALIAS_NOT_FOUND")
    assert await refused(service.generate(f"{name}@live")) == ("NOT_FOUND", "ALIAS_NOT_FOUND")
    assert await refused(service.generate(name)) == ("FAILED_PRECONDITION", "ALIAS_MISSING")
    assert await refused(service.generate(f"../{name}")) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    await registry.stub.CreateAdapter(pb2.CreateAdapterRequest(adapter_id="empty"))
    assert await refused(service.generate("empty@v1")) == ("NOT_FOUND", "ADAPTER_VERSION_NOT_FOUND")
    await registry.stub.DeleteAdapterVersion(pb2.DeleteAdapterVersionRequest(name=f"{name}@v2"))
    await becomes(service, f"{name}@v2", ("NOT_FOUND", "ADAPTER_VERSION_NOT_FOUND"))
    await registry.stub.DeleteAdapterAlias(pb2.DeleteAdapterAliasRequest(name=f"{name}@candidate"))
    await becomes(service, f"{name}@candidate", ("NOT_FOUND", "ALIAS_NOT_FOUND"))
    await registry.stub.DeleteAdapter(pb2.DeleteAdapterRequest(name=name, force=True))
    await becomes(service, f"{name}@v1", ("NOT_FOUND", "ADAPTER_NOT_FOUND"))


async def becomes(service: Inference, adapter: str, expected: tuple[str, str]) -> None:
    """A deletion waits for nobody: the front hears of it a moment later."""
    async with asyncio.timeout(10):
        while True:
            try:
                await service.generate(adapter)
            except grpc.aio.AioRpcError as error:
                code, reason, _, _ = explained(error)
                assert (code.name, reason) == expected
                return


async def test_a_models_default_is_applied_where_a_request_names_nothing(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle
) -> None:
    await publish(registry, oracle, 1, 2, adapter=name)
    await registry.set_alias(f"{name}@live", "v1")
    assert not (await set_default(registry, f"{name}@live")).unconfirmed_replicas
    assert await service.generate() == (nth(name, 1), oracle.alone(1))
    await registry.set_alias(f"{name}@live", "v2")
    assert await service.generate() == (nth(name, 2), oracle.alone(2))
    assert await service.generate(f"{name}@v1") == (nth(name, 1), oracle.alone(1))
    await registry.stub.DisableAdapters(pb2.DisableAdaptersRequest(model="tiny"))
    assert await service.generate() == ("", oracle.alone(None))
    await registry.stub.EnableAdapters(pb2.EnableAdaptersRequest(model="tiny"))
    assert await service.generate() == (nth(name, 2), oracle.alone(2))
    await set_default(registry, "")
    assert await service.generate() == ("", oracle.alone(None))


async def test_swaps_under_load_fail_nothing_and_no_later_request_gets_the_old_version(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle
) -> None:
    """8 clients, 50 swaps. What was live before the last confirmed swap may not answer what starts after it."""
    await publish(registry, oracle, 1, 2, adapter=name)
    await registry.set_alias(f"{name}@live", "v1")
    expected = {nth(name, 1): oracle.alone(1), nth(name, 2): oracle.alone(2)}
    confirmed = [nth(name, 1)]
    swapping = [False]
    done = asyncio.Event()
    num_strict = [0]

    async def client(seed: int) -> int:
        count, chance = 0, random.Random(seed)
        while not done.is_set():
            count += 1
            mark, was_swapping = len(confirmed), swapping[0]
            version, tokens = await service.generate(name)
            assert tokens == expected[version], f"{version} answered with another's tokens"
            # What may answer: the one confirmed when it began, and any set since.
            may = set(confirmed[mark - 1 :])
            if was_swapping or swapping[0] or len(confirmed) > mark:
                may |= {nth(name, 1), nth(name, 2)}
            else:
                num_strict[0] += 1
            assert version in may, f"{version} answered after {confirmed[mark - 1]} was confirmed"
            await asyncio.sleep(chance.random() * 0.01)
        return count

    async def swap() -> None:
        for number in range(50):
            version = ("v2", "v1")[number % 2]
            swapping[0] = True
            answer = await registry.set_alias(f"{name}@live", version)
            assert not answer.unconfirmed_replicas
            confirmed.append(answer.alias.version)
            swapping[0] = False
            first, second = await asyncio.gather(service.generate(name), service.generate(f"{name}@live"))
            assert first[0] == second[0] == answer.alias.version
        done.set()

    async with asyncio.TaskGroup() as tasks:
        clients = [tasks.create_task(client(seed)) for seed in range(8)]
        tasks.create_task(swap())
    assert sum(task.result() for task in clients) >= 100
    assert num_strict[0] > 0


async def test_a_request_keeps_the_version_it_began_with(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alias moved and version deleted after the name was resolved, before the worker has seen it."""
    await publish(registry, oracle, 1, 2, adapter=name)
    await registry.set_alias(f"{name}@live", "v1")
    resolve: Any = service.front._resolve_adapter
    resolved, go = asyncio.Event(), asyncio.Event()

    async def slow(model: str, adapter: str) -> Any:
        found = await resolve(model, adapter)
        resolved.set()
        await go.wait()
        return found

    service.front.use_adapters(slow)
    early = asyncio.create_task(service.generate(name))
    await resolved.wait()
    await registry.set_alias(f"{name}@live", "v2")
    await registry.stub.DeleteAdapterVersion(pb2.DeleteAdapterVersionRequest(name=f"{name}@v1"))
    go.set()
    assert await early == (nth(name, 1), oracle.alone(1))
    assert await service.generate(name) == (nth(name, 2), oracle.alone(2))


async def test_with_the_registry_gone_what_is_known_is_served_and_it_is_followed_again_when_it_is_back(
    base: Path, oracle: Oracle, tmp_path: Path, assert_eventually: Eventually
) -> None:
    async with adapter_service(tmp_path / "registry") as registry:
        await publish(registry, oracle, 1, 2)
        await registry.set_alias("support@live", "v1")
        port = registry.port
        context = inference(base, port, tmp_path / "cache")
        service = await context.__aenter__()
        assert await service.generate("support") == (V1, oracle.alone(1))
    try:
        assert await service.generate("support") == (V1, oracle.alone(1))
        assert await service.generate() == ("", oracle.alone(None))
        # Known, but its files were never fetched.
        code, reason = await refused(service.generate("support@v2"))
        assert (code, reason) == ("UNAVAILABLE", "DEPENDENCY_UNAVAILABLE")
        async with adapter_service(tmp_path / "registry", port=port) as registry:
            await registry.set_alias("support@live", "v2")

            async def follows() -> bool:
                return (await service.generate("support"))[0] == V2

            async with asyncio.timeout(30):
                while not await follows():
                    await asyncio.sleep(0.05)
            assert not (await registry.set_alias("support@live", "v1")).unconfirmed_replicas
            assert await service.generate("support") == (V1, oracle.alone(1))
    finally:
        await context.__aexit__(None, None, None)


async def test_a_front_that_never_met_the_registry_serves_the_base_and_says_why_not_more(
    base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    async with inference(base, 1, tmp_path / "cache", wait=False) as service:
        assert await service.generate() == ("", oracle.alone(None))
        code, reason, message, metadata = await failure(service.generate("support"))
        assert (code.name, reason) == ("UNAVAILABLE", "DEPENDENCY_UNAVAILABLE")
        assert "registry" in message
        assert metadata["dependency"] == "adapters"


async def test_files_on_disk_that_were_cut_are_fetched_again_by_the_next_process(
    base: Path, registry: AdapterClient, oracle: Oracle, tmp_path: Path, name: str
) -> None:
    await publish(registry, oracle, 1, adapter=name)
    cache = tmp_path / "cache"
    async with inference(base, registry.port, cache) as service:
        assert (await service.generate(f"{name}@v1"))[0] == nth(name, 1)
        stored = next(cache.iterdir()) / WEIGHTS
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-50])
    async with inference(base, registry.port, cache) as service:
        assert await service.generate(f"{name}@v1") == (nth(name, 1), oracle.alone(1))
    assert stored.read_bytes() == whole
    assert [path.name for path in cache.iterdir()] == [stored.parent.name]


async def test_a_file_cut_under_a_running_service_fails_that_adapter_only(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle
) -> None:
    """The front has verified it, the worker reads it later: typed, and alone."""
    await publish(registry, oracle, 11, 12, adapter=name)
    version = await registry.stub.GetAdapterVersion(pb2.GetAdapterVersionRequest(name=f"{name}@v1"))
    resolve: Any = service.front._resolve_adapter

    async def cut_after_resolving(model: str, adapter: str) -> Any:
        found = await resolve(model, adapter)
        if adapter == f"{name}@v1":
            stored = service.cache / version.digest.removeprefix("sha256:") / WEIGHTS
            stored.write_bytes(stored.read_bytes()[:-50])
        return found

    service.front.use_adapters(cut_after_resolving)
    cut, other, plain = await asyncio.gather(
        service.generate(f"{name}@v1"), service.generate(f"{name}@v2"), service.generate(), return_exceptions=True
    )
    assert other == (nth(name, 2), oracle.alone(12))
    assert plain == ("", oracle.alone(None))

    async def again() -> None:
        assert isinstance(cut, BaseException)
        raise cut

    assert await refused(again()) == ("FAILED_PRECONDITION", "CORRUPT_ARTIFACT")


async def test_stored_bytes_that_were_damaged_in_the_registry_are_refused(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle, registry_folder: Path
) -> None:
    await publish(registry, oracle, 21, 22, adapter=name)
    damaged = [path for path in registry_folder.rglob("*") if path.is_file() and path.stat().st_size > 5000]
    target = next(path for path in damaged if path.read_bytes() == oracle.adapter(21)[WEIGHTS])
    target.chmod(0o600)
    target.write_bytes(target.read_bytes()[:-8] + b"\0" * 8)
    assert await refused(service.generate(f"{name}@v1")) == ("FAILED_PRECONDITION", "CORRUPT_ARTIFACT")
    assert await service.generate(f"{name}@v2") == (nth(name, 2), oracle.alone(22))
    assert [path for path in service.cache.iterdir() if path.name.startswith("partial-")] == []


async def test_an_adapter_of_another_base_is_refused_before_the_worker_sees_it(
    registry: AdapterClient, service: Inference, oracle: Oracle, tmp_path: Path
) -> None:
    wider = Oracle(save_base(tmp_path / "wider", hidden=64), tmp_path / "wider-adapters")
    await registry.upload("shapes", wider.adapter(1), chunk_bytes=100_000, base_model=BASE)
    await registry.upload("names", oracle.adapter(1), chunk_bytes=100_000, base_model="models/another")
    await registry.upload("ranks", oracle.adapter(65, rank=65), chunk_bytes=100_000, base_model=BASE)
    for name in ("shapes", "names"):
        assert await refused(service.generate(f"{name}@v1")) == ("FAILED_PRECONDITION", "INCOMPATIBLE_ADAPTER")
    assert await refused(service.generate("ranks@v1")) == ("FAILED_PRECONDITION", "INCOMPATIBLE_ADAPTER")
    assert await service.generate() == ("", oracle.alone(None))


async def test_kill_9_of_the_worker_during_the_first_use_of_an_adapter(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle, assert_eventually: Eventually
) -> None:
    """The file is a pipe for the first worker: it waits in the middle of the load until it is killed."""
    await publish(registry, oracle, 31, adapter=name)
    assert await service.generate(f"{name}@v1") == (nth(name, 1), oracle.alone(31))
    await publish(registry, oracle, 32, adapter=name)
    resolve: Any = service.front._resolve_adapter
    pins: list[Any] = []

    async def pipe_first(model: str, adapter: str) -> Any:
        found = await resolve(model, adapter)
        if adapter == f"{name}@v2" and not pins:
            pins.append(found)
            config = Path(found.folder) / "adapter_config.json"
            shutil.move(config, config.with_suffix(".kept"))
            os.mkfifo(config)
        return found

    service.front.use_adapters(pipe_first)
    pid = service.front.status("tiny").worker_pid
    assert pid is not None
    first_use = asyncio.create_task(service.generate(f"{name}@v2"))
    await assert_eventually(lambda: pins)
    config = Path(pins[0].folder) / "adapter_config.json"
    ends: list[int | None] = []
    await assert_eventually(lambda: ends.append(_reader_of(config)) or ends[-1] is not None)
    beside = asyncio.create_task(service.generate(f"{name}@v1"))
    os.kill(pid, signal.SIGKILL)
    os.close(ends[-1] or 0)
    config.unlink()
    shutil.move(config.with_suffix(".kept"), config)
    # Nobody had a token yet: both begin anew on the next worker.
    assert await first_use == (nth(name, 2), oracle.alone(32))
    assert await beside == (nth(name, 1), oracle.alone(31))
    assert service.front.status("tiny").worker_pid != pid


def _reader_of(pipe: Path) -> int | None:
    """Our end of a pipe that somebody waits to read; None while nobody does."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # ENXIO
        return None


async def test_more_adapters_than_slots_take_turns(
    base: Path, registry: AdapterClient, oracle: Oracle, tmp_path: Path, name: str
) -> None:
    await publish(registry, oracle, 1, 2, 3, adapter=name)
    async with inference(base, registry.port, tmp_path / "cache", adapter_slots=2) as service:
        wanted = [number for _ in range(4) for number in (1, 2, 3)]
        answers = await asyncio.gather(*[service.generate(f"{name}@v{number}") for number in wanted])
    for number, (version, tokens) in zip(wanted, answers, strict=True):
        assert (version, tokens) == (nth(name, number), oracle.alone(number))


async def test_first_use_by_many_is_one_download(
    registry: AdapterClient, service: Inference, name: str, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(registry, oracle, 41, adapter=name)
    downloads: list[Any] = []
    run = registry.registry.downloads.run
    monkeypatch.setattr(
        registry.registry.downloads, "run", lambda request: (downloads.append(request), run(request))[1]
    )
    answers = await asyncio.gather(*[service.generate(f"{name}@v1") for _ in range(10)])
    assert answers == [(nth(name, 1), oracle.alone(41))] * 10
    assert len(downloads) == 1
