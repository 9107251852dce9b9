"""Garbage: what is referred to stays, whatever happens beside the collector; what is not goes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from slipstream_server.errors import CorruptArtifact, DependencyUnavailable, InvalidField, NotFound
from slipstream_server.storage.artifact_places import Stored
from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.garbage import Collected, References, Retention, collect
from unit.storage.artifact_kit import put

NO_GRACE = timedelta(0)
HOUR = timedelta(hours=1)


def references(*digests: str) -> References:
    async def read() -> AbstractSet[str]:
        return set(digests)

    return read


def blobs(root: Path) -> set[str]:
    return {file.name for file in (root / "blobs").rglob("*") if file.is_file()}


def age(root: Path, by: timedelta = 2 * HOUR) -> None:
    """Make everything in a local store look as if it had been written ``by`` ago."""
    then = time.time() - by.total_seconds()
    for entry in root.rglob("*"):
        os.utime(entry, (then, then))


async def test_what_nothing_refers_to_goes_and_shared_blobs_stay(store: ArtifactStore) -> None:
    kept = (await put(store, "adapter", {"common": b"common", "own": b"kept"})).digest
    gone = (await put(store, "adapter", {"common": b"common", "own": b"gone"})).digest
    await _let_a_second_pass(store)
    collected = await collect(store, references(kept), NO_GRACE)
    assert collected == Collected(artifacts=1, blobs=1, leftovers=0)
    assert await store.digests() == (kept,)
    await store.verify(kept)
    with pytest.raises(NotFound):
        await store.manifest(gone)


async def test_nothing_younger_than_the_grace_goes(store: ArtifactStore) -> None:
    digest = (await put(store, "adapter", {"a": b"young"})).digest
    assert await collect(store, references(), HOUR) == Collected(artifacts=0, blobs=0, leftovers=0)
    await store.verify(digest)


async def test_storing_again_and_touching_renew_the_grace(local_store: ArtifactStore, tmp_path: Path) -> None:
    again = await put(local_store, "adapter", {"a": b"again"})
    touched = await put(local_store, "adapter", {"a": b"touched"})
    await put(local_store, "adapter", {"a": b"gone"})
    age(tmp_path / "store")
    await put(local_store, "adapter", {"a": b"again"})
    await local_store.touch(touched.digest)
    assert await collect(local_store, references(), HOUR) == Collected(artifacts=1, blobs=1, leftovers=0)
    assert set(await local_store.digests()) == {again.digest, touched.digest}
    for artifact in (again, touched):
        await local_store.verify(artifact.digest)


async def test_touching_makes_an_artifact_young_again(store: ArtifactStore) -> None:
    digest = (await put(store, "adapter", {"a": b"touched"})).digest
    [before] = await _listed(store, "manifests")
    await _let_a_second_pass(store)
    await store.touch(digest)
    [after] = await _listed(store, "manifests")
    assert after.key == before.key
    assert after.modified_s > before.modified_s
    await store.verify(digest)


async def test_a_row_written_while_collecting_saves_its_artifact(local_store: ArtifactStore, tmp_path: Path) -> None:
    digest = (await put(local_store, "adapter", {"a": b"saved"})).digest
    age(tmp_path / "store")
    answers = [set[str](), {digest}]

    async def changing() -> AbstractSet[str]:
        return answers.pop(0)

    assert await collect(local_store, changing, HOUR) == Collected(artifacts=0, blobs=0, leftovers=0)
    await local_store.verify(digest)


async def test_leftovers_of_dead_writers_go_and_running_uploads_stay(
    local_store: ArtifactStore, tmp_path: Path
) -> None:
    staging = tmp_path / "store" / "staging"
    (staging / "dead").mkdir()
    (staging / "dead" / "0").write_bytes(b"half")
    (staging / "manifest-of-a-dead-writer").write_bytes(b"half")
    age(tmp_path / "store")
    async with local_store.draft("dataset") as draft:
        async with draft.file("a") as file:
            await file.write(b"x")
        assert await collect(local_store, references(), HOUR) == Collected(artifacts=0, blobs=0, leftovers=2)
        artifact = await draft.commit()
    await local_store.verify(artifact.digest)


async def test_blobs_of_a_crashed_commit_go(local_store: ArtifactStore, tmp_path: Path) -> None:
    orphan = tmp_path / "store" / "blobs" / "sha256" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"published, but its manifest never came")
    age(tmp_path / "store")
    assert await collect(local_store, references(), HOUR) == Collected(artifacts=0, blobs=1, leftovers=0)
    assert not orphan.exists()


async def test_no_blob_goes_while_a_manifest_that_stays_is_damaged(local_store: ArtifactStore, tmp_path: Path) -> None:
    kept = (await put(local_store, "adapter", {"a": b"kept"})).digest
    await put(local_store, "adapter", {"a": b"gone"})
    before = blobs(tmp_path / "store")
    [manifest] = (tmp_path / "store" / "manifests").rglob(kept)
    manifest.unlink()
    manifest.write_bytes(b"{")
    age(tmp_path / "store")
    with pytest.raises(CorruptArtifact):
        await collect(local_store, references(kept), HOUR)
    assert blobs(tmp_path / "store") == before


async def test_storing_what_is_just_being_collected_keeps_it_whole(local_store: ArtifactStore, tmp_path: Path) -> None:
    outcomes = set()
    for _ in range(40):
        old = (await put(local_store, "adapter", {"common": b"common", "own": b"own"})).digest
        age(tmp_path / "store")
        collected, again = await asyncio.gather(
            collect(local_store, references(), HOUR),
            put(local_store, "adapter", {"common": b"common", "own": b"own"}),
        )
        assert again.digest == old
        await local_store.verify(old)
        outcomes.add(collected)
    assert Collected(artifacts=0, blobs=0, leftovers=0) != max(outcomes, key=lambda outcome: outcome.artifacts)


async def test_deleting_waits_for_a_publisher_and_then_looks_again(local_store: ArtifactStore, tmp_path: Path) -> None:
    await put(local_store, "adapter", {"a": b"x"})
    age(tmp_path / "store")
    [stored] = await _listed(local_store, "blobs")
    with open(tmp_path / "store" / "lock", "ab") as publisher:
        fcntl.flock(publisher, fcntl.LOCK_SH)
        deleting = asyncio.create_task(
            local_store.threads.run(local_store.place.delete_if_older, stored.key, time.time())
        )
        await asyncio.wait({deleting}, timeout=0.1)
        assert not deleting.done()
        in_the_future = time.time() + 3600
        os.utime(tmp_path / "store" / stored.key, (in_the_future, in_the_future))
    assert await asyncio.wait_for(deleting, timeout=10) is False
    assert (tmp_path / "store" / stored.key).exists()


async def test_an_object_store_that_is_away_is_unavailable(tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="no S3 client here: install s3fs")
    nobody = {"endpoint_url": "http://127.0.0.1:1", "region_name": "eu-west-1"}
    options = {"key": "k", "secret": "s", "client_kwargs": nobody, "config_kwargs": {"retries": {"max_attempts": 1}}}
    store = open_store("s3://bucket/below", staging=tmp_path / "staging", options=options)
    for ask in (store.digests(), store.manifest("0" * 64), put(store, "adapter", {"a": b"x"})):
        with pytest.raises(DependencyUnavailable) as caught:
            await ask
        assert "127.0.0.1" not in str(caught.value)
    assert list((tmp_path / "staging").iterdir()) == []
    store.close()


async def test_a_negative_grace_is_refused(local_store: ArtifactStore) -> None:
    with pytest.raises(InvalidField, match="grace"):
        await collect(local_store, references(), -HOUR)


NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("keep_last", "younger_than_days", "expired_days"),
    [(0, 0, [9, 7, 5, 3, 1]), (2, 0, [9, 7, 5]), (9, 0, []), (0, 5, [9, 7, 5]), (1, 4, [9, 7, 5]), (4, 4, [9])],
)
def test_retention_keeps_the_newest_and_the_young(
    keep_last: int, younger_than_days: int, expired_days: list[int]
) -> None:
    retention = Retention(keep_last=keep_last, younger_than=timedelta(days=younger_than_days))
    expired = retention.expired([3, 9, 1, 7, 5], made=lambda days: NOW - timedelta(days=days), now=NOW)
    assert expired == expired_days


@pytest.mark.parametrize("bad", [{"keep_last": -1}, {"keep_last": 0, "younger_than": -HOUR}])
def test_a_retention_below_zero_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidField):
        Retention(**bad)


async def _listed(store: ArtifactStore, prefix: str) -> list[Stored]:
    return await store.threads.run(lambda: list(store.place.listed(prefix)))


async def _let_a_second_pass(store: ArtifactStore) -> None:
    """Until the place's clock, which counts whole seconds on S3, is past what has been written."""
    newest_s = max(stored.modified_s for stored in await _listed(store, ""))
    while time.time() < newest_s + 1.01:
        await asyncio.sleep(0.05)
