"""Adapter files on the local disk: fetched once, hashed, put in place whole or not at all."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from slipstream_server.errors import CorruptArtifact, DependencyUnavailable, SlipstreamError
from slipstream_server.inference.adapter_store import AdapterStore, FileChunk
from slipstream_server.inference.registry_copy import AdapterFile, ServableVersion
from slipstream_server.resource_names import AdapterVersionName
from slipstream_server.storage.artifact_manifest import FileEntry, Manifest
from unit.adapters.lora_files import CONFIG, WEIGHTS, lora_files, sha256


def version_of(files: Mapping[str, bytes]) -> ServableVersion:
    entries = tuple(AdapterFile(path=path, size_bytes=len(raw), sha256=sha256(raw)) for path, raw in files.items())
    manifest = {file.path: FileEntry(file.sha256, file.size_bytes) for file in entries}
    digest = Manifest("adapter", datetime.now(UTC), manifest).digest
    return ServableVersion(name=AdapterVersionName("support", "v1"), digest=digest, files=entries)


class Registry:
    """Sends ``files`` in chunks, waits for ``go``, and counts how often it was asked."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.num_fetches = 0
        self.go = asyncio.Event()
        self.go.set()
        self.error: SlipstreamError | None = None

    async def fetch(self, version: ServableVersion) -> AsyncIterator[FileChunk]:
        self.num_fetches += 1
        for path, raw in self.files.items():
            for offset in range(0, len(raw), 1000):
                yield FileChunk(path, offset, raw[offset : offset + 1000])
            await self.go.wait()
        if self.error is not None:
            raise self.error


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_many_who_ask_at_once_are_one_fetch(tmp_path: Path) -> None:
    files = lora_files()
    registry, version = Registry(files), version_of(files)
    store = AdapterStore(tmp_path, registry.fetch)
    folders = await asyncio.gather(*[store.folder_of(version) for _ in range(20)])
    assert set(folders) == {tmp_path / version.digest}
    assert stored(folders[0]) == files
    await store.folder_of(version)
    assert registry.num_fetches == 1
    # The next process hashes what lies here, and fetches nothing.
    assert await AdapterStore(tmp_path, registry.fetch).folder_of(version) == folders[0]
    assert registry.num_fetches == 1


async def test_who_gives_up_does_not_end_the_fetch_of_others(tmp_path: Path) -> None:
    files = lora_files()
    registry, version = Registry(files), version_of(files)
    registry.go.clear()
    store = AdapterStore(tmp_path, registry.fetch)
    first = asyncio.create_task(store.folder_of(version))
    second = asyncio.create_task(store.folder_of(version))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    registry.go.set()
    assert stored(await second) == files
    assert registry.num_fetches == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda files: {**files, WEIGHTS: files[WEIGHTS][:-7]},
        lambda files: {**files, WEIGHTS: files[WEIGHTS] + b"more"},
        lambda files: {**files, CONFIG: files[CONFIG].replace(b"r", b"s", 1)},
        lambda files: {CONFIG: files[CONFIG]},
        lambda files: {**files, "adapter_model.bin": b"pickle"},
    ],
)
async def test_other_bytes_than_announced_are_refused_and_leave_nothing(tmp_path: Path, damage: object) -> None:
    files = lora_files()
    registry = Registry(damage(files))  # type: ignore[operator]
    store = AdapterStore(tmp_path, registry.fetch)
    with pytest.raises(CorruptArtifact):
        await store.folder_of(version_of(files))
    assert list(tmp_path.iterdir()) == []
    # A failure is not remembered: what has been mended is fetched.
    registry.files = files
    assert stored(await store.folder_of(version_of(files))) == files


async def test_a_digest_that_is_not_that_of_the_files_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    files = lora_files()
    registry, version = Registry(files), version_of(files)
    store = AdapterStore(tmp_path, registry.fetch)
    with pytest.raises(CorruptArtifact):
        await store.folder_of(replace(version, digest="0" * 64))
    with pytest.raises(CorruptArtifact):
        await store.folder_of(version_of({**files, "../../evil": b"x"}))
    assert registry.num_fetches == 0


async def test_what_was_changed_on_the_disk_is_fetched_again_by_the_next_process(tmp_path: Path) -> None:
    files = lora_files()
    registry, version = Registry(files), version_of(files)
    folder = await AdapterStore(tmp_path, registry.fetch).folder_of(version)
    (folder / WEIGHTS).write_bytes(files[WEIGHTS][:-1] + b"?")
    assert stored(await AdapterStore(tmp_path, registry.fetch).folder_of(version)) == files
    assert registry.num_fetches == 2


async def test_a_registry_that_breaks_off_and_a_store_that_closes(tmp_path: Path) -> None:
    files = lora_files()
    registry, version = Registry(files), version_of(files)
    store = AdapterStore(tmp_path, registry.fetch)
    registry.error = DependencyUnavailable("gone")
    with pytest.raises(DependencyUnavailable):
        await store.folder_of(version)
    registry.go.clear()
    waiting = asyncio.create_task(store.folder_of(version))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert list(tmp_path.iterdir()) == []


async def test_tidying_keeps_the_last_used_and_drops_what_crashes_left(tmp_path: Path) -> None:
    now = time.time()
    for age_s, name in ((1, "new"), (100, "old"), (7200, "partial-dead"), (5, "partial-alive")):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(b"x" * 600)
        os.utime(tmp_path / name / WEIGHTS, (now - age_s, now - age_s))
    AdapterStore(tmp_path, Registry({}).fetch).tidy(max_bytes=1300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "partial-alive"]
