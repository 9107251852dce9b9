"""What goes by itself, and what stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.training.datasets import DatasetDetails, Datasets
from slipstream_server.training.housekeeping import Housekeeping, Places
from slipstream_server.training.resources import FileOfDataset, as_json
from slipstream_server.training.specification import JobSpec
from slipstream_server.training.states import JobState
from slipstream_server.training.tables import CheckpointRow, JobRow
from unit.storage.artifact_kit import put

NO_GRACE = timedelta(0)
ROW = b'{"prompt": "p", "completion": "c"}\n'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    store = open_store(str(tmp_path / "artifacts"))
    yield store
    store.close()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(jobs=tmp_path / "jobs", cache=tmp_path / "cache")


@pytest.fixture
def housekeeping(database: Database, store: ArtifactStore, places: Places) -> Housekeeping:
    return Housekeeping(database, store, places, kept=timedelta(days=30))


def age(folder: Path, hours: float = 2) -> None:
    then = time.time() - 3600 * hours
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


async def add_job(database: Database, places: Places, name: str, state: JobState, days_ago: float) -> Path:
    ended = utc_now() - timedelta(days=days_ago)
    spec = as_json(JobSpec(base_model="b", dataset="d"))
    async with database.write() as session:
        session.add(JobRow(id=name, dataset="d", spec_json=spec, state=state, end_time=ended))
        await session.flush()
        session.add(CheckpointRow(job=name, step=1, size_bytes=1, create_time=ended))
    folder = places.jobs / name / "checkpoints"
    folder.mkdir(parents=True)
    age(places.jobs / name)
    return folder


async def test_old_ended_jobs_lose_their_files_and_nothing_else(
    database: Database, places: Places, housekeeping: Housekeeping
) -> None:
    old = await add_job(database, places, "old", JobState.SUCCEEDED, 31)
    young = await add_job(database, places, "young", JobState.SUCCEEDED, 29)
    paused = await add_job(database, places, "paused", JobState.PAUSED, 365)
    await housekeeping.round()
    assert (old.exists(), young.exists(), paused.exists()) == (False, True, True)
    async with database.read() as session:
        assert await session.get(JobRow, "old") is not None
        assert await session.get(CheckpointRow, ("old", 1)) is None
        assert await session.get(CheckpointRow, ("young", 1)) is not None


async def test_folders_without_a_job_go_once_they_are_old(places: Places, housekeeping: Housekeeping) -> None:
    orphan, fresh = places.jobs / "orphan", places.jobs / "fresh"
    for folder in (orphan, fresh):
        folder.mkdir(parents=True)
    age(orphan)
    await housekeeping.round()
    assert (orphan.exists(), fresh.exists()) == (False, True)


async def test_files_go_with_their_dataset(
    database: Database, store: ArtifactStore, places: Places, housekeeping: Housekeeping
) -> None:
    datasets = Datasets(database, store, places.cache)
    files = (FileOfDataset(path="a.jsonl", size_bytes=len(ROW), sha256="", split="train"),)
    artifact = await put(store, "dataset", {"a.jsonl": ROW})
    dataset = await datasets.add("ann", "talk", artifact, files, DatasetDetails())
    await datasets.folder(dataset)
    age(places.cache)
    await housekeeping.round(NO_GRACE)
    assert await store.digests() == (artifact.digest,)
    assert list(places.cache.iterdir())
    await datasets.delete("ann", "talk", "")
    await housekeeping.round(NO_GRACE)
    assert await store.digests() == ()
    assert not list(places.cache.iterdir())


def test_the_training_service_never_imports_torch() -> None:
    script = "import sys, slipstream_server.rpc.training.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
