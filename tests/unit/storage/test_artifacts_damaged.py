"""What is damaged, killed halfway or without room: artifacts are whole or absent, and the loss is named."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

import pytest

from slipstream_server.errors import CorruptArtifact, DependencyUnavailable, StorageFull
from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.garbage import collect
from unit.storage.artifact_kit import BIG, FILES, content, put, sha256
from unit.storage.conftest import S3Server

NO_GRACE = timedelta(0)
WRITE_FOREVER = """
import asyncio, sys
from slipstream_server.storage.artifacts import open_store
from unit.storage.artifact_kit import put

async def main():
    store, number = open_store(sys.argv[1]), 0
    while True:
        number += 1
        files = {"number": str(number).encode(), "bulk": str(number).encode() * 300_000}
        print((await put(store, "adapter", files)).digest, flush=True)

asyncio.run(main())
"""


async def test_a_bucket_that_is_gone_is_unavailable(s3_server: S3Server, tmp_path: Path) -> None:
    store = s3_server.store(tmp_path / "staging", bucket_exists=False)
    with pytest.raises(DependencyUnavailable):
        await put(store, "dataset", {"a": b"x"})
    assert list(store.place.staging.iterdir()) == []
    store.close()


async def test_a_damaged_cache_is_made_anew(store: ArtifactStore, tmp_path: Path) -> None:
    digest = (await put(store, "adapter", FILES)).digest
    folder = await store.materialize(digest, tmp_path / "cache")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").write_bytes(b"{}")
    again = await store.materialize(digest, tmp_path / "cache")
    assert (again / "adapter_config.json").read_bytes() == FILES["adapter_config.json"]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [digest]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
async def test_damage_in_the_store_is_found_and_mended_by_storing_again(
    local_store: ArtifactStore, tmp_path: Path, damage: str
) -> None:
    digest = (await put(local_store, "adapter", FILES)).digest
    [blob] = (tmp_path / "store" / "blobs").rglob(sha256(BIG))
    damaged = {"flipped": BIG[:-1] + bytes([BIG[-1] ^ 1]), "truncated": BIG[:-1], "missing": None}[damage]
    blob.unlink()
    if damaged is not None:
        blob.write_bytes(damaged)
    received = bytearray()
    with pytest.raises(CorruptArtifact):
        async with aclosing(local_store.read(digest, "weights/adapter_model.safetensors")) as chunks:
            async for chunk in chunks:
                received += chunk
    assert len(received) < len(BIG) - 1  # never the whole file
    with pytest.raises(CorruptArtifact):
        await local_store.verify(digest)
    with pytest.raises(CorruptArtifact):
        await local_store.materialize(digest, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    await put(local_store, "adapter", FILES)
    await local_store.verify(digest)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"[]", b"null", b'{"files":{"../x":{"sha256":"0","size_bytes":1}}}', b"\xff", b"[" * 100_000],
    ids=lambda data: ascii(data[:12]),
)
async def test_a_damaged_manifest_is_found(local_store: ArtifactStore, tmp_path: Path, manifest: bytes) -> None:
    digest = (await put(local_store, "adapter", FILES)).digest
    [file] = (tmp_path / "store" / "manifests").rglob(digest)
    file.unlink()
    file.write_bytes(manifest)
    with pytest.raises(CorruptArtifact, match=digest):
        await local_store.manifest(digest)


def test_kill_9_of_a_writer_leaves_every_artifact_whole(tmp_path: Path) -> None:
    root, tests = tmp_path / "store", Path(__file__).parents[2]
    acknowledged: set[str] = set()
    for num_puts in (1, 2, 5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(root)], stdout=subprocess.PIPE, text=True, cwd=tests
        )
        assert writer.stdout is not None
        acknowledged |= {writer.stdout.readline().strip() for _ in range(num_puts)}
        writer.send_signal(signal.SIGKILL)
        acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        writer.wait()

    async def check() -> None:
        store = open_store(str(root))
        digests = set(await store.digests())
        assert acknowledged <= digests
        for digest in digests:
            await store.verify(digest)

        async def references() -> set[str]:
            return acknowledged

        await collect(store, references, NO_GRACE)
        assert set(await store.digests()) == acknowledged
        assert list(store.place.staging.iterdir()) == []
        for digest in acknowledged:
            await store.verify(digest)
        store.close()

    asyncio.run(check())


async def test_a_full_disk_is_named_and_what_is_stored_stays(small_disk: Path) -> None:
    store = open_store(str(small_disk / "store"))
    kept = await put(store, "dataset", {"a": b"x" * 100_000})
    with pytest.raises(StorageFull):
        await put(store, "dataset", {"small": b"y", "big": BIG})
    assert list(store.place.staging.iterdir()) == []
    assert await store.digests() == (kept.digest,)
    assert await content(store, kept.digest, "a") == b"x" * 100_000
    await put(store, "dataset", {"b": b"z" * 100_000})
    store.close()


async def test_a_full_cache_is_named_and_left_clean(local_store: ArtifactStore, small_disk: Path) -> None:
    digest = (await put(local_store, "adapter", FILES)).digest
    with pytest.raises(StorageFull):
        await local_store.materialize(digest, small_disk / "cache")
    assert list((small_disk / "cache").iterdir()) == []
