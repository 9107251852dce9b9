"""Events and the place up to which the spool was read are stored together: nothing is lost, nothing told twice."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream_server.errors import FencedOut
from slipstream_server.storage.database import Database
from slipstream_server.training import events as spool
from slipstream_server.training.fence import Fence
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.journal import JobEvent, Journal, LogLine
from slipstream_server.training.resources import as_json
from slipstream_server.training.specification import JobSpec
from slipstream_server.training.spool import SpoolWriter
from slipstream_server.training.spool_intake import SpoolIntake, Taken, ending_of
from slipstream_server.training.states import JobState
from slipstream_server.training.tables import EVENTS, AttemptRow, CheckpointRow, JobRow

JOB = "job"


def encode(event: JobEvent) -> bytes:
    return event.body.message.encode() if isinstance(event.body, LogLine) else type(event.body).__name__.encode()


@pytest.fixture
async def fence(database: Database) -> Fence:
    fence = Fence(database)
    await fence.take_over()
    return fence


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    (tmp_path / JOB).mkdir()
    return JobFolder(tmp_path / JOB)


async def begin(database: Database) -> None:
    spec = JobSpec(base_model="b", dataset="d")
    async with database.write() as session:
        session.add(JobRow(id=JOB, dataset="d", spec_json=as_json(spec), state=JobState.STARTING, attempt=1))
        await session.flush()
        session.add(AttemptRow(job=JOB, number=1, mark="m", spool_offset=0))


async def told(database: Database) -> list[str]:
    async with database.read() as session:
        found = await EVENTS.read(session, JOB, 0, limit=10_000)
    assert [event.sequence for event in found] == list(range(1, len(found) + 1))
    return [event.payload.decode() for event in found]


def log_line(number: int) -> spool.Log:
    return spool.Log(level="INFO", message=f"line {number}")


async def test_what_was_taken_is_not_taken_again_by_the_next_service(
    database: Database, fence: Fence, folder: JobFolder
) -> None:
    await begin(database)
    with SpoolWriter(folder.events(1)) as writer:
        writer.write(log_line(1))
        assert await SpoolIntake(fence, Journal(encode)).take(JOB, 1, folder) is Taken.SOMETHING
        writer.write(log_line(2))
    successor = SpoolIntake(fence, Journal(encode))
    assert await successor.take(JOB, 1, folder) is Taken.SOMETHING
    assert await successor.take(JOB, 1, folder) is Taken.NOTHING
    assert await told(database) == ["line 1", "line 2"]


async def test_a_write_that_fails_takes_nothing(database: Database, fence: Fence, folder: JobFolder) -> None:
    await begin(database)
    with SpoolWriter(folder.events(1)) as writer:
        writer.write(log_line(1))
    stale = SpoolIntake(fence, Journal(encode))
    newer = Fence(database)
    await newer.take_over()
    with pytest.raises(FencedOut):
        await stale.take(JOB, 1, folder)
    assert await told(database) == []
    assert await SpoolIntake(newer, Journal(encode)).take(JOB, 1, folder) is Taken.SOMETHING
    assert await told(database) == ["line 1"]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(1, 400), max_size=12), restarts=st.lists(st.booleans(), min_size=13, max_size=13))
async def test_a_spool_that_grows_by_any_pieces_is_told_whole(cuts: list[int], restarts: list[bool]) -> None:
    """Bytes arrive in pieces that know nothing of lines, and the service is replaced between any two of them."""
    import tempfile

    from slipstream_server.storage.database import DatabaseConfig
    from slipstream_server.storage.migrations import migrate
    from slipstream_server.training.tables import SCHEMA

    content = b"".join(msgspec.json.encode(log_line(number)) + b"\n" for number in range(20))
    with tempfile.TemporaryDirectory() as place:
        database = Database(DatabaseConfig.sqlite(Path(place, "training.db")))
        try:
            await migrate(database, SCHEMA)
            await begin(database)
            fence = Fence(database)
            await fence.take_over()
            intake, folder = SpoolIntake(fence, Journal(encode)), JobFolder(Path(place))
            ends = sorted({min(sum(cuts[: index + 1]), len(content)) for index in range(len(cuts))} | {len(content)})
            start = 0
            for end, is_replaced in zip(ends, restarts, strict=False):
                append(folder.events(1), content[start:end])
                start = end
                if is_replaced:
                    intake = SpoolIntake(fence, Journal(encode))
                while await intake.take(JOB, 1, folder) is not Taken.NOTHING:
                    pass
            assert await told(database) == [f"line {number}" for number in range(20)]
        finally:
            await database.close()


def append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, data)
    os.close(descriptor)


async def test_checkpoints_are_those_that_are_there(database: Database, fence: Fence, folder: JobFolder) -> None:
    """The runner keeps two; a resumed attempt forgets what came after its checkpoint."""
    await begin(database)
    intake = SpoolIntake(fence, Journal(encode))
    with SpoolWriter(folder.events(1)) as writer:
        writer.write(started(0))
        for step in (4, 8, 12):
            writer.write(spool.Checkpoint(step=step, name=f"checkpoint-{step}", digest="", size_bytes=step))
    await intake.take(JOB, 1, folder)
    assert await steps(database) == [8, 12]
    async with database.write() as session:
        session.add(AttemptRow(job=JOB, number=2, mark="n", spool_offset=0))
        row = await session.get_one(JobRow, JOB)
        row.attempt, row.state = 2, JobState.STARTING
    with SpoolWriter(folder.events(2)) as writer:
        writer.write(started(8))
    await intake.take(JOB, 2, folder)
    assert await steps(database) == [8]


async def steps(database: Database) -> list[int]:
    from sqlalchemy import select

    async with database.read() as session:
        return list(await session.scalars(select(CheckpointRow.step).order_by(CheckpointRow.step)))


def started(step: int) -> spool.Started:
    return spool.Started(
        total_steps=20,
        resumed_from_step=step,
        num_train_examples=1,
        num_held_out_examples=1,
        num_trainable_parameters=1,
        world_size=1,
        device="cpu",
        precision="float32",
    )


async def test_the_first_failure_is_the_cause(database: Database, fence: Fence, folder: JobFolder) -> None:
    await begin(database)
    with SpoolWriter(folder.events(1)) as writer:
        writer.write(spool.Failed(reason="STORAGE_FULL", message="full"))
        writer.write(spool.Failed(reason="INTERNAL", message="another process followed"))
    await SpoolIntake(fence, Journal(encode)).take(JOB, 1, folder)
    async with database.read() as session:
        ending = ending_of(await session.get_one(AttemptRow, (JOB, 1)))
    assert isinstance(ending, spool.Failed)
    assert ending.reason == "STORAGE_FULL"
