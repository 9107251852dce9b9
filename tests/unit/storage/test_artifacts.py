"""Artifacts: whole or absent, on a folder and on an S3 server alike."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.errors import (
    CorruptArtifact,
    DependencyUnavailable,
    InvalidField,
    NotFound,
    QuotaExceeded,
    StorageFull,
    WrongState,
)
from slipstream_server.storage.artifact_manifest import ArtifactLimits, check_path
from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.garbage import collect
from unit.storage.conftest import S3Server

NO_GRACE = timedelta(0)
BIG = random.Random(7).randbytes(3 * 1024 * 1024 + 17)
FILES = {"adapter_config.json": b'{"r": 8}', "weights/adapter_model.safetensors": BIG, "empty": b""}

WRITE_FOREVER = """
import asyncio, sys
from slipstream_server.storage.artifacts import open_store

async def main():
    store, number = open_store(sys.argv[1]), 0
    while True:
        number += 1
        files = {"number": str(number).encode(), "bulk": str(number).encode() * 300_000}
        print((await store.put("adapter", files)).digest, flush=True)

asyncio.run(main())
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def expected_digest(files: dict[str, bytes]) -> str:
    entries = ",".join(
        f'"{path}":{{"sha256":"{sha256(data)}","size_bytes":{len(data)}}}' for path, data in sorted(files.items())
    )
    return sha256(f"{{{entries}}}".encode())


async def content(store: ArtifactStore, digest: str, path: str) -> bytes:
    async with aclosing(store.read(digest, path)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def stored_keys(store: ArtifactStore) -> list[str]:
    return await store.threads.run(lambda: [stored.key for stored in store.place.listed("")])


async def nothing_left(store: ArtifactStore) -> bool:
    blobs = [key for key in await stored_keys(store) if key.startswith(("blobs/", "manifests/"))]
    return blobs == [] and list(store.place.staging.iterdir()) == []


async def test_an_artifact_is_stored_and_read_back(store: ArtifactStore) -> None:
    artifact = await store.put("adapter", FILES)
    assert artifact.digest == expected_digest(FILES)
    assert await store.digests() == (artifact.digest,)
    for path, data in FILES.items():
        assert await content(store, artifact.digest, path) == data
    manifest = await store.verify(artifact.digest)
    assert manifest == artifact.manifest
    assert manifest.kind == "adapter"
    assert manifest.total_bytes == sum(map(len, FILES.values()))
    assert list(store.place.staging.iterdir()) == []


async def test_bytes_lie_under_their_hash(store: ArtifactStore) -> None:
    digest = (await store.put("adapter", {"a": b"same", "b": b"same", "c": b"other"})).digest
    same, other = sha256(b"same"), sha256(b"other")
    keys = [key for key in await stored_keys(store) if key != "lock"]
    assert sorted(keys) == sorted(
        [
            f"blobs/sha256/{same[:2]}/{same}",
            f"blobs/sha256/{other[:2]}/{other}",
            f"manifests/sha256/{digest[:2]}/{digest}",
        ]
    )
    raw = await store.threads.run(lambda: b"".join(store.place.chunks(f"manifests/sha256/{digest[:2]}/{digest}")))
    assert json.loads(raw)["files"]["a"] == {"sha256": same, "size_bytes": 4}


async def test_the_same_files_are_the_same_artifact(store: ArtifactStore) -> None:
    first = await store.put("adapter", FILES)
    second = await store.put("checkpoint", dict(reversed(FILES.items())))
    assert first.digest == second.digest
    assert len(await store.digests()) == 1


async def test_many_at_once(store: ArtifactStore) -> None:
    puts = (store.put("dataset", {"common": BIG, "own": str(n % 5).encode()}) for n in range(15))
    artifacts = await asyncio.gather(*puts)
    assert len({artifact.digest for artifact in artifacts}) == 5
    for digest in await store.digests():
        await store.verify(digest)


async def test_chunks_are_checked_against_what_was_announced(store: ArtifactStore) -> None:
    async with store.draft("dataset") as draft:
        async with draft.file("rows.jsonl", sha256=sha256(BIG), size_bytes=len(BIG)) as file:
            for at in range(0, len(BIG), 100_003):
                await file.write(BIG[at : at + 100_003])
        artifact = await draft.commit()
    assert artifact.digest == expected_digest({"rows.jsonl": BIG})


@pytest.mark.parametrize(
    ("announced", "sent", "message"),
    [
        ({"sha256": sha256(b"other")}, b"data", "has " + sha256(b"data")),
        ({"size_bytes": 10 * 1000**3}, b"x" * 1000, "10000000000 bytes, 1000 arrived"),
        ({"size_bytes": 3}, b"data", "3 bytes, more arrived"),
        ({"size_bytes": 0}, b"x", "0 bytes, more arrived"),
        ({"sha256": sha256(BIG), "size_bytes": len(BIG)}, BIG[:-1], f"{len(BIG) - 1} arrived"),
    ],
    ids=["wrong hash", "claim of 10 GB", "longer", "not empty", "truncated"],
)
async def test_bytes_that_are_not_as_announced_leave_nothing(
    store: ArtifactStore, announced: dict[str, object], sent: bytes, message: str
) -> None:
    with pytest.raises(CorruptArtifact, match=message):
        async with store.draft("dataset") as draft:
            async with draft.file("good") as file:
                await file.write(b"good")
            async with draft.file("rows.jsonl", **announced) as file:
                await file.write(sent)
    assert await nothing_left(store)


async def test_an_upload_abandoned_halfway_leaves_nothing(store: ArtifactStore) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield BIG
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await store.put("dataset", {"first": b"whole", "second": chunks()})
    async with store.draft("dataset") as draft:
        async with draft.file("a") as file:
            await file.write(BIG)
    assert await nothing_left(store)


async def test_an_upload_cancelled_at_any_moment_is_whole_or_absent(store: ArtifactStore) -> None:
    for delay_ms in (0, 1, 3, 10, 30, 60):
        task = asyncio.create_task(store.put("dataset", {"a": BIG, "b": str(delay_ms).encode()}))
        await asyncio.wait({task}, timeout=delay_ms / 1000)
        task.cancel()
        await asyncio.wait({task})
        assert list(store.place.staging.iterdir()) == []
    for digest in await store.digests():
        await store.verify(digest)


@pytest.mark.parametrize(
    ("limits", "files"),
    [
        (ArtifactLimits(max_file_bytes=9), {"a": b"x" * 10}),
        (ArtifactLimits(max_total_bytes=9), {"a": b"x" * 5, "b": b"x" * 5}),
        (ArtifactLimits(max_files=2), {"a": b"", "b": b"", "c": b""}),
    ],
    ids=["file", "total", "files"],
)
async def test_too_much_is_refused_and_leaves_nothing(
    store: ArtifactStore, limits: ArtifactLimits, files: dict[str, bytes]
) -> None:
    with pytest.raises(QuotaExceeded, match="at most"):
        await store.put("dataset", files, limits)
    assert await nothing_left(store)


async def test_too_big_a_claim_is_refused_before_its_first_byte(store: ArtifactStore) -> None:
    async with store.draft("dataset", ArtifactLimits(max_file_bytes=10)) as draft:
        for size_bytes in (11, 2**31, 2**63):
            with pytest.raises(QuotaExceeded):
                draft.file("a", size_bytes=size_bytes)
        with pytest.raises(InvalidField, match="size_bytes: -1"):
            draft.file("a", size_bytes=-1)
        with pytest.raises(InvalidField, match="sha256"):
            draft.file("a", sha256="ABC")


BAD_PATHS = [
    "",
    ".",
    "..",
    "../x",
    "a/../x",
    "/etc/passwd",
    "a\0b",
    "..%2f",
    "a\\b",
    "C:\\x",
    "a//b",
    "a/",
    "/a",
    "./a",
    ".hidden",
    "a/.hidden",
    "-rf",
    "a b",
    "a\nb",
    "a\n",
    "ａ",
    "а",
    "a\u200b",
    "\u202egnp.exe",
    "\ud800",
    "a:b",
    "~root",
    "$HOME",
    "a*",
    "x" * 129,
    "x/" * 8 + "x",
    "/".join(["x" * 100] * 3),
    "x" * 4096,
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path[:20]))
async def test_a_path_that_is_not_allowed_is_refused(local_store: ArtifactStore, path: str) -> None:
    with pytest.raises(InvalidField) as caught:
        await local_store.put("dataset", {path: b"data"})
    assert caught.value.violations[0].field == "path"
    assert caught.value.message.isascii()
    assert await nothing_left(local_store)


@given(st.text(alphabet=st.sampled_from("abC09_.+-/\\ \0é%~"), max_size=40))
def test_an_allowed_path_stays_below_its_folder(path: str) -> None:
    try:
        check_path(path)
    except InvalidField:
        return
    root = Path("/some/root")
    assert os.path.normpath(root / path) == f"{root}/{path}"


@pytest.mark.parametrize("second", ["a/b", "a", "a/b/c"])
async def test_a_path_cannot_be_twice_or_both_file_and_folder(local_store: ArtifactStore, second: str) -> None:
    for first, then in (("a/b", second), (second, "a/b")):
        async with local_store.draft("dataset") as draft:
            async with draft.file(first) as file:
                await file.write(b"x")
            with pytest.raises(InvalidField, match="collides"):
                draft.file(then)


async def test_a_draft_is_written_in_order_and_committed_once(local_store: ArtifactStore) -> None:
    async with local_store.draft("dataset") as draft:
        with pytest.raises(InvalidField, match="at least one file"):
            await draft.commit()
        file = draft.file("a")
        with pytest.raises(WrongState):
            draft.file("b")
        with pytest.raises(WrongState):
            await draft.commit()
        await file.write(b"x")
        await file.finish()
        assert await file.finish() == await file.finish()
        artifact = await draft.commit()
        with pytest.raises(WrongState):
            await draft.commit()
        with pytest.raises(WrongState):
            draft.file("b")
    await local_store.verify(artifact.digest)


async def test_a_bucket_that_is_gone_is_unavailable(s3_server: S3Server, tmp_path: Path) -> None:
    store = s3_server.store(tmp_path / "staging", bucket_exists=False)
    with pytest.raises(DependencyUnavailable):
        await store.put("dataset", {"a": b"x"})
    assert list(store.place.staging.iterdir()) == []
    store.close()


async def test_what_is_not_there_is_not_found(store: ArtifactStore) -> None:
    digest = (await store.put("dataset", {"a": b"x"})).digest
    for ask in (store.manifest, store.verify, store.touch):
        with pytest.raises(NotFound):
            await ask("0" * 64)
        for bad in ("", "../x", digest.upper(), digest[:-1], f"{digest}\n", "a\0b"):
            with pytest.raises(InvalidField, match="digest"):
                await ask(bad)
    with pytest.raises(InvalidField, match="'b' is not a file"):
        await content(store, digest, "b")


async def test_a_small_file_is_read_at_once_and_a_big_one_refused(store: ArtifactStore) -> None:
    digest = (await store.put("adapter", FILES)).digest
    assert await store.read_bytes(digest, "adapter_config.json", 1000) == FILES["adapter_config.json"]
    with pytest.raises(QuotaExceeded, match="at most 1000"):
        await store.read_bytes(digest, "weights/adapter_model.safetensors", 1000)


async def test_materialized_files_are_those_of_the_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    digest = (await store.put("adapter", FILES)).digest
    cache = tmp_path / "cache"
    folders = await asyncio.gather(*(store.materialize(digest, cache) for _ in range(4)))
    assert set(folders) == {cache / digest}
    found = {file.relative_to(folders[0]).as_posix(): file for file in folders[0].rglob("*") if file.is_file()}
    assert {path: file.read_bytes() for path, file in found.items()} == FILES
    assert {file.stat().st_mode & 0o222 for file in found.values()} == {0}
    assert [entry.name for entry in cache.iterdir()] == [digest]


async def test_a_damaged_cache_is_made_anew(store: ArtifactStore, tmp_path: Path) -> None:
    digest = (await store.put("adapter", FILES)).digest
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
    digest = (await local_store.put("adapter", FILES)).digest
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
    await local_store.put("adapter", FILES)
    await local_store.verify(digest)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"[]", b"null", b'{"files":{"../x":{"sha256":"0","size_bytes":1}}}', b"\xff", b"[" * 100_000],
    ids=lambda data: ascii(data[:12]),
)
async def test_a_damaged_manifest_is_found(local_store: ArtifactStore, tmp_path: Path, manifest: bytes) -> None:
    digest = (await local_store.put("adapter", FILES)).digest
    [file] = (tmp_path / "store" / "manifests").rglob(digest)
    file.unlink()
    file.write_bytes(manifest)
    with pytest.raises(CorruptArtifact, match=digest):
        await local_store.manifest(digest)


async def test_a_folder_is_stored_without_following_links(local_store: ArtifactStore, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.json").write_bytes(b"{}")
    (folder / "sub" / "b.bin").write_bytes(BIG)
    artifact = await local_store.put_folder("checkpoint", folder)
    assert artifact.digest == expected_digest({"a.json": b"{}", "sub/b.bin": BIG})
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidField, match="link or a special file"):
        await local_store.put_folder("checkpoint", folder)
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(InvalidField, match="link or a special file"):
        await local_store.put_folder("checkpoint", folder)


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
    kept = await store.put("dataset", {"a": b"x" * 100_000})
    with pytest.raises(StorageFull):
        await store.put("dataset", {"small": b"y", "big": BIG})
    assert list(store.place.staging.iterdir()) == []
    assert await store.digests() == (kept.digest,)
    assert await content(store, kept.digest, "a") == b"x" * 100_000
    await store.put("dataset", {"b": b"z" * 100_000})
    store.close()


async def test_a_full_cache_is_named_and_left_clean(local_store: ArtifactStore, small_disk: Path) -> None:
    digest = (await local_store.put("adapter", FILES)).digest
    with pytest.raises(StorageFull):
        await local_store.materialize(digest, small_disk / "cache")
    assert list((small_disk / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "root",
    [
        "http://169.254.169.254/",
        "ftp://x",
        "memory://x",
        "file://host/x",
        "file://relative",
        "github://a",
        "s3://bucket/x",
    ],
)
def test_a_root_that_is_not_allowed_is_refused(root: str) -> None:
    with pytest.raises(InvalidField, match=r"artifacts\."):
        open_store(root)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/a%20b").close()
    assert (tmp_path / "a b" / "staging").is_dir()
