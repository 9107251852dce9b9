"""Readers that lag, leave or come too late, and a front that goes down: rows are freed, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from dataclasses import replace

import pytest
from tests.conftest import Eventually
from tests.unit.inference.collecting import collect
from tests.unit.inference.front_calls import answer, call, ready

from slipstream_server.errors import DeadlineExceeded, Draining, SlowReader, Unavailable
from slipstream_server.inference.calls import DeltaEvent, FinishedEvent, StartedEvent
from unit.inference.conftest import OpenFront
from unit.inference.fake_worker import ANSWER, ENDLESS, SILENT, STALL


async def test_a_lagging_reader_gets_merged_deltas(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        text = "hello world hello there " * 20
        stream = await fake.front.open(answer(fake, text))
        await assert_eventually(lambda: stream.is_ended)
        events = [event async for event in stream]
        assert [type(event) for event in events] == [StartedEvent, DeltaEvent, FinishedEvent]
        assert isinstance(events[1], DeltaEvent)
        assert events[1].text == text


async def test_a_reader_that_stops_is_cut_off_and_frees_its_row(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front(write_timeout_s=0.2) as fake:
        await ready(fake, assert_eventually)
        stream = await fake.front.open(call(ENDLESS, 20))
        await assert_eventually(lambda: "cancel 1" in fake.lines())
        assert fake.front.num_streams == 0
        with pytest.raises(SlowReader):
            await collect(stream)


@pytest.mark.parametrize("how", ["close", "cancel", "leave"])
async def test_whoever_goes_away_frees_the_row(open_front: OpenFront, assert_eventually: Eventually, how: str) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        stream = await fake.front.open(call(SILENT))
        await assert_eventually(lambda: "submit 1" in fake.lines())
        if how == "close":
            await stream.aclose()
        elif how == "leave":
            async with stream:
                pass
        else:
            reading = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        await assert_eventually(lambda: "cancel 1" in fake.lines())
        assert [event async for event in stream] == []
        assert fake.front.num_streams == 0


async def test_five_hundred_abandoned_streams_leave_nothing(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front(max_batch_size=16) as fake:
        await ready(fake, assert_eventually)
        tasks = len(asyncio.all_tasks())
        streams = [await fake.front.open(call(ENDLESS, 20, max_new_tokens=4000)) for _ in range(250)]

        async def read_one() -> None:
            async with await fake.front.open(call(ENDLESS, 20, max_new_tokens=4000)) as stream:
                await collect(stream)

        readers = [asyncio.create_task(read_one()) for _ in range(250)]
        await assert_eventually(lambda: fake.front.num_streams == 500)
        await assert_eventually(lambda: sum("submit" in line for line in fake.lines()) >= 32)
        for reader in readers:
            reader.cancel()
        for stream in streams:
            stream.close()
        await asyncio.gather(*readers, return_exceptions=True)
        dispatcher = fake.front._models["fake"].dispatcher
        assert (dispatcher.num_in_flight, len(dispatcher.queue), fake.front.num_streams) == (0, 0, 0)
        dispatcher.check_integrity()
        await assert_eventually(lambda: len(asyncio.all_tasks()) == tasks)
        result = await collect(await fake.front.open(call(ANSWER, 20)))
        assert result.usage.completion_tokens == 3


async def test_a_deadline_far_away_does_not_hold_a_stream_that_has_ended(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        far = replace(call(ANSWER, 20), deadline_monotonic_s=time.monotonic() + 3600)
        ended, closed = await fake.front.open(far), await fake.front.open(far)
        await collect(ended)
        closed.close()
        streams = [weakref.ref(ended), weakref.ref(closed)]
        del ended, closed

        def all_gone() -> bool:
            gc.collect()
            return all(stream() is None for stream in streams)

        await assert_eventually(all_gone)


async def test_deadlines_end_requests_wherever_they_are(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front(max_batch_size=1) as fake:
        await ready(fake, assert_eventually)
        soon_s = time.monotonic() + 0.2
        streams = [await fake.front.open(replace(call(SILENT), deadline_monotonic_s=soon_s)) for _ in range(4)]
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert all(isinstance(result, DeadlineExceeded) for result in results)
        await assert_eventually(lambda: "cancel 2" in fake.lines())
        submitted = {line for line in fake.lines() if line.startswith("submit")}
        assert submitted == {"submit 1", "submit 2"}
        with pytest.raises(DeadlineExceeded):
            await fake.front.open(replace(call(ANSWER), deadline_monotonic_s=time.monotonic() - 1))


async def test_draining_finishes_what_runs_and_ends_the_rest(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        long = await fake.front.open(call(STALL, 20))
        short = await fake.front.open(call(ANSWER, 20))
        draining = asyncio.create_task(fake.front.drain(grace_s=0.3))
        await asyncio.sleep(0)
        with pytest.raises(Draining) as caught:
            await fake.front.open(call(ANSWER, 20))
        assert caught.value.retry_after_s is not None
        results = await asyncio.gather(collect(long), collect(short), return_exceptions=True)
        await draining
        assert isinstance(results[0], Unavailable)
        assert not isinstance(results[1], BaseException)


async def test_a_dead_task_stops_the_front_loudly(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        stream = await fake.front.open(call(SILENT))

        def broken() -> float:
            raise RuntimeError("a bug in the sweeper")

        stream.unread_s = broken  # type: ignore[method-assign]
        with pytest.raises(ExceptionGroup, match="TaskGroup"):
            await asyncio.wait_for(fake.front.wait_stopped(), 10)
        with pytest.raises(Unavailable):
            await collect(stream)
        with pytest.raises(Draining):
            await fake.front.open(call(ANSWER))
