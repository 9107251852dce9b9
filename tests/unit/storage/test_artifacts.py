"""Artifacts: whole or absent, on a folder and on an S3 server alike."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.errors import CorruptArtifact, InvalidField, NotFound, QuotaExceeded, WrongState
from slipstream_server.storage.artifact_manifest import ArtifactLimits, check_path
from slipstream_server.storage.artifacts import ArtifactStore, open_store
from unit.storage.artifact_kit import BIG, FILES, content, expected_digest, nothing_left, put, sha256, stored_keys


async def test_an_artifact_is_stored_and_read_back(store: ArtifactStore) -> None:
    artifact = await put(store, "adapter", FILES)
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
    digest = (await put(store, "adapter", {"a": b"same", "b": b"same", "c": b"other"})).digest
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
    first = await put(store, "adapter", FILES)
    second = await put(store, "checkpoint", dict(reversed(FILES.items())))
    assert first.digest == second.digest
    assert len(await store.digests()) == 1


async def test_many_at_once(store: ArtifactStore) -> None:
    puts = (put(store, "dataset", {"common": BIG, "own": str(n % 5).encode()}) for n in range(15))
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
        await put(store, "dataset", {"first": b"whole", "second": chunks()})
    async with store.draft("dataset") as draft:
        async with draft.file("a") as file:
            await file.write(BIG)
    assert await nothing_left(store)


async def test_an_upload_cancelled_at_any_moment_is_whole_or_absent(store: ArtifactStore) -> None:
    for delay_ms in (0, 1, 3, 10, 30, 60):
        task = asyncio.create_task(put(store, "dataset", {"a": BIG, "b": str(delay_ms).encode()}))
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
        await put(store, "dataset", files, limits)
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
        await put(local_store, "dataset", {path: b"data"})
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


async def test_what_is_not_there_is_not_found(store: ArtifactStore) -> None:
    digest = (await put(store, "dataset", {"a": b"x"})).digest
    for ask in (store.manifest, store.verify, store.touch):
        with pytest.raises(NotFound):
            await ask("0" * 64)
        for bad in ("", "../x", digest.upper(), digest[:-1], f"{digest}\n", "a\0b"):
            with pytest.raises(InvalidField, match="digest"):
                await ask(bad)
    with pytest.raises(InvalidField, match="'b' is not a file"):
        await content(store, digest, "b")


async def test_a_small_file_is_read_at_once_and_a_big_one_refused(store: ArtifactStore) -> None:
    digest = (await put(store, "adapter", FILES)).digest
    assert await store.read_bytes(digest, "adapter_config.json", 1000) == FILES["adapter_config.json"]
    with pytest.raises(QuotaExceeded, match="at most 1000"):
        await store.read_bytes(digest, "weights/adapter_model.safetensors", 1000)


async def test_materialized_files_are_those_of_the_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    digest = (await put(store, "adapter", FILES)).digest
    cache = tmp_path / "cache"
    folders = await asyncio.gather(*(store.materialize(digest, cache) for _ in range(4)))
    assert set(folders) == {cache / digest}
    found = {file.relative_to(folders[0]).as_posix(): file for file in folders[0].rglob("*") if file.is_file()}
    assert {path: file.read_bytes() for path, file in found.items()} == FILES
    assert {file.stat().st_mode & 0o222 for file in found.values()} == {0}
    assert [entry.name for entry in cache.iterdir()] == [digest]


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
