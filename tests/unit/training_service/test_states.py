"""The states of jobs: whatever callers and the supervisor do, in whatever order, a job's history is one valid way."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream_server.errors import FencedOut, QueueFull, WrongState
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import drift, migrate
from slipstream_server.training.fence import Fence
from slipstream_server.training.jobs import JobDetails, Jobs
from slipstream_server.training.journal import JobEvent, Journal, StateChanged
from slipstream_server.training.resources import as_json
from slipstream_server.training.specification import JobPlan, JobSpec
from slipstream_server.training.states import ENDED, NEXT, WITH_PROCESSES, JobState, check_next
from slipstream_server.training.tables import EVENTS, SCHEMA, JobRow

OWNER, JOB = "ann", "job"
PLAN = JobPlan(
    base_model_name="b",
    base_model_revision="",
    base_model_digest="",
    dataset_digest="",
    device="cpu",
    memory_bytes=1,
    num_train_rows=1,
    num_evaluation_rows=0,
    num_skipped_rows=0,
    recipe_digest="",
)
SUPERVISOR_MOVES = [state for state in JobState if state not in (JobState.VALIDATING, JobState.PAUSED)]


def encode(event: JobEvent) -> bytes:
    """Enough of an event to check the way."""
    if not isinstance(event.body, StateChanged):
        return b"{}"
    return json.dumps([event.body.previous, event.body.state]).encode()


async def test_the_revisions_make_what_the_tables_declare(database: Database) -> None:
    assert await drift(database, SCHEMA) == []


def test_every_state_can_be_left_for_an_end_and_ends_only_by_resuming() -> None:
    for state, following in NEXT.items():
        if state in ENDED:
            assert following <= {JobState.QUEUED}
        else:
            assert JobState.CANCELLED in following
    assert NEXT[JobState.SUCCEEDED] == frozenset()


@pytest.mark.parametrize("state", JobState)
def test_only_the_states_that_may_follow_do(state: JobState) -> None:
    for following in JobState:
        if following in NEXT[state]:
            check_next(state, following)
        else:
            with pytest.raises(WrongState) as caught:
                check_next(state, following)
            assert caught.value.metadata == {"state": state.upper()}


Step = tuple[str, JobState | None]
STEPS = st.lists(
    st.one_of(
        st.sampled_from([("cancel", None), ("pause", None), ("resume", None)]),
        st.sampled_from([("move", state) for state in SUPERVISOR_MOVES]),
    ),
    max_size=25,
)


class World:
    """One job, driven by steps; refusals are part of the way."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.journal = Journal(encode)
        self.jobs = Jobs(database, self.journal, folder)

    async def begin(self) -> None:
        await self.jobs.add(OWNER, JobDetails(id=JOB), JobSpec(base_model="b", dataset="d"))
        async with self.database.write() as session:
            (await session.get_one(JobRow, JOB)).plan_json = as_json(PLAN)

    async def take(self, step: Step) -> None:
        name, state = step
        actions: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "cancel": lambda: self.jobs.cancel(OWNER, JOB, 1),
            "pause": lambda: self.jobs.pause(OWNER, JOB),
            "resume": lambda: self.jobs.resume(OWNER, JOB, None),
            "move": lambda: self.move(state),
        }
        try:
            await actions[name]()
        except WrongState:
            pass

    async def move(self, state: JobState | None) -> None:
        assert state is not None
        async with self.database.write() as session:
            await self.journal.move(session, await session.get_one(JobRow, JOB), state)

    async def check(self) -> None:
        async with self.database.read() as session:
            stored = await EVENTS.read(session, JOB, 0, limit=1000)
            row = await session.get_one(JobRow, JOB)
        assert [event.sequence for event in stored] == list(range(1, row.last_sequence + 1))
        way = [tuple(json.loads(event.payload)) for event in stored if event.payload != b"{}"]
        assert way[0] == (None, "validating")
        for (_, before), (previous, after) in itertools.pairwise(way):
            assert previous == before
            assert after in NEXT[JobState(before)]
        assert way[-1][1] == row.state
        assert (row.end_time is not None) == (row.state in ENDED)
        if row.state not in WITH_PROCESSES and row.state != JobState.PUBLISHING:
            assert row.wish == ""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_any_order_of_calls_and_moves_is_one_valid_way(steps: list[Step]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            database = Database(DatabaseConfig.sqlite(Path(folder, "training.db")))
            try:
                await migrate(database, SCHEMA)
                world = World(database, Path(folder))
                await world.begin()
                for step in steps:
                    await world.take(step)
                await world.check()
            finally:
                await database.close()

    asyncio.run(run())


async def test_an_older_supervisor_writes_nothing(database: Database) -> None:
    old, new = Fence(database), Fence(database)
    await old.take_over()
    async with old.write():
        pass
    await new.take_over()
    with pytest.raises(FencedOut):
        async with old.write() as session:
            session.add(JobRow(id="x", dataset="d", spec_json="{}", state="queued"))
    async with new.write() as session:
        assert await session.get(JobRow, "x") is None


async def test_a_full_queue_refuses(database: Database, tmp_path: Path) -> None:
    jobs = Jobs(database, Journal(encode), tmp_path, max_waiting=2)
    spec = JobSpec(base_model="b", dataset="d")
    await jobs.add(OWNER, JobDetails(), spec)
    await jobs.add(OWNER, JobDetails(), spec)
    with pytest.raises(QueueFull):
        await jobs.add(OWNER, JobDetails(), spec)
