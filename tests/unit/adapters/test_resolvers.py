"""Who is waited for when the registry changes."""

from __future__ import annotations

import asyncio

import pytest

from slipstream_server.adapters.resolvers import Resolvers
from slipstream_server.errors import WrongState


async def test_without_resolvers_a_change_is_confirmed_at_once() -> None:
    assert await Resolvers().confirmed(5, 60) == ()


async def test_all_live_resolvers_are_waited_for() -> None:
    resolvers = Resolvers()
    with resolvers.watching("a") as a, resolvers.watching("b") as b:
        a.sent = b.sent = 5
        waiting = asyncio.create_task(resolvers.confirmed(5, 60))
        resolvers.acknowledge("a", a.watch_id, 5)
        resolvers.acknowledge("b", b.watch_id, 4)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        resolvers.acknowledge("b", b.watch_id, 5)
        assert await waiting == ()


async def test_who_arrives_while_others_are_waited_for_is_waited_for_too() -> None:
    resolvers = Resolvers()
    with resolvers.watching("a") as a:
        a.sent = 5
        waiting = asyncio.create_task(resolvers.confirmed(5, 60))
        await asyncio.sleep(0)
        with resolvers.watching("b") as b:
            b.sent = 5
            resolvers.acknowledge("a", a.watch_id, 5)
            await asyncio.sleep(0)
            assert not waiting.done()
            resolvers.acknowledge("b", b.watch_id, 5)
            assert await waiting == ()


async def test_who_leaves_and_comes_back_in_time_counts_as_confirmed() -> None:
    resolvers = Resolvers()
    with resolvers.watching("b") as b:
        b.sent = 5
        with resolvers.watching("a"):
            waiting = asyncio.create_task(resolvers.confirmed(5, 60))
            await asyncio.sleep(0)
        with resolvers.watching("a") as again:
            again.sent = 5
            resolvers.acknowledge("a", again.watch_id, 5)
            resolvers.acknowledge("b", b.watch_id, 5)
            assert await waiting == ()


async def test_time_runs_out_for_who_is_silent() -> None:
    resolvers = Resolvers()
    with resolvers.watching("a"):
        assert await resolvers.confirmed(1, 0.01) == ("a",)
        assert await resolvers.confirmed(1, 0) == ("a",)
    assert await resolvers.confirmed(1, 0.01) == ()


async def test_an_older_stream_does_not_end_its_successor() -> None:
    resolvers = Resolvers()
    older = resolvers.watching("a")
    watch = older.__enter__()
    with resolvers.watching("a") as newer:
        assert watch.replaced.is_set()
        older.__exit__(None, None, None)
        assert resolvers.acknowledge("a", newer.watch_id, 0) == 0
        with pytest.raises(WrongState):
            resolvers.acknowledge("a", watch.watch_id, 0)
