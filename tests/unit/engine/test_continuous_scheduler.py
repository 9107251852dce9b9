"""The continuous scheduler's promises, with rows whose tokens are drawn from a list: no model, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.engine.scheduler_driving import Driver, limits, sequence

from slipstream_server.inference.engine.continuous_scheduler import Plan, StepLimits
from slipstream_server.inference.engine.sequences import Sequence


def chunks_of(plan: Plan) -> dict[int, int]:
    return {chunk.sequence.row.request.id: chunk.num_tokens for chunk in plan.chunks}


def stream(start: int) -> Iterator[list[int]]:
    """Prompts of which no two begin alike."""
    for number in count(start):
        yield [number, *range(40)]


def test_a_better_priority_overtakes_for_so_long_and_no_longer() -> None:
    """Better ones arrive for ever, one every two seconds; the worse one runs when it has waited its ten."""
    driver = Driver(8, limits(max_running=1))
    worse = sequence(next(stream(1000)), at_s=0.0, priority=1)
    driver.scheduler.add(worse)
    overtakers = []
    for number, prompt in enumerate(stream(0)):
        better = sequence(prompt, at_s=2.0 * number + 0.1, priority=0)
        driver.scheduler.add(better)
        overtakers.append(better)
        while better in list(driver.scheduler) and worse.row.is_live:
            driver.step()
        if not worse.row.is_live:
            break
        assert number < 50, "it starves"
    assert len([one for one in overtakers if not one.row.is_live]) == 5


def test_decoding_goes_first_and_prompts_share_what_is_left() -> None:
    driver = Driver(40, limits(max_step_tokens=101))
    first = sequence([1] * 5, 50)
    driver.scheduler.add(first)
    driver.step()
    long, short = sequence([2] * 300), sequence([3] * 40)
    driver.scheduler.add(long)
    driver.scheduler.add(short)
    plan = driver.step()
    ids = [one.row.request.id for one in (first, long, short)]
    assert chunks_of(plan) == dict(zip(ids, [1, 50, 40], strict=True))
    assert plan.chunks[0].sequence is first


def test_nobody_joins_before_all_that_run_have_their_share() -> None:
    driver = Driver(40, limits(max_step_tokens=32))
    long, late = sequence([2] * 300), sequence([3] * 4)
    driver.scheduler.add(long)
    driver.scheduler.add(late)
    for _ in range(3):
        assert list(chunks_of(driver.step())) == [long.row.request.id]


def test_where_memory_runs_out_the_worst_ranked_gives_way_and_comes_back() -> None:
    driver = Driver(3, limits())
    first, second = sequence([1] * 30, 40, at_s=0.0), sequence([2] * 30, 40, at_s=1.0)
    driver.scheduler.add(first)
    driver.scheduler.add(second)
    while first.row.is_live:
        driver.step()
    assert driver.scheduler.num_preemptions >= 1
    assert second.row.is_live
    assert driver.drain(200)
    assert second.row.finish_reason == "length"


def test_equal_prompts_are_computed_once() -> None:
    driver = Driver(40, limits(max_step_tokens=64))
    stem = list(range(4)) * 32
    crowd = [sequence([*stem, number]) for number in range(4)]
    for one in crowd:
        driver.scheduler.add(one)
    computed = 0
    while driver.scheduler.has_work:
        computed += sum(chunk.count for chunk in driver.step().chunks if chunk.count > 1)
    assert [one.num_cached for one in crowd] == [0, 128, 128, 128]
    # The first reads its 129 tokens in chunks, of which the last is one token; the others compute one token each.
    assert computed == 128


def test_of_a_prompt_that_is_known_to_its_end_the_last_block_is_computed_again() -> None:
    """The logits after its last token are wanted, and nobody has kept them."""
    driver = Driver(40, limits())
    first, second = sequence([1] * 96, 1), sequence([1] * 96, 1)
    for one in (first, second):
        driver.scheduler.add(one)
        driver.drain(20)
    assert (first.num_cached, second.num_cached) == (0, 64)
    assert second.row.num_generated == 1


def test_a_prefix_that_lies_idle_is_no_room_for_who_reads_it() -> None:
    """Three blocks are kept of the first and one is free, when three more than those are wanted."""
    driver = Driver(6, limits(max_step_tokens=256))
    first, other = sequence([1] * 96, 1), sequence([2] * 33, 20)
    driver.scheduler.add(first)
    driver.drain(20)
    driver.scheduler.add(other)
    driver.step()
    reader = sequence([1] * 96 + [3] * 64, 1)
    driver.scheduler.add(reader)
    driver.step()
    assert (other.is_running, reader.is_running) == (True, False)
    driver.drain(100)
    assert reader.num_cached == 96


@pytest.mark.parametrize("ends", ["cancelled", "preempted"])
def test_a_prefix_that_never_comes_is_computed_by_who_waits_for_it(ends: str) -> None:
    driver = Driver(12, limits(max_step_tokens=32))
    stem = list(range(4)) * 40
    producer = sequence([*stem, 1], at_s=5.0)
    driver.scheduler.add(producer)
    driver.step()
    consumer = sequence([*stem, 2], at_s=1.0)
    driver.scheduler.add(consumer)
    driver.step()
    assert not consumer.is_running
    if ends == "cancelled":
        producer.row.dropped = True
        driver.scheduler.remove(producer)
    else:
        driver.scheduler._preempt(producer)
    driver.step()
    assert consumer.is_running
    driver.drain(100)


@pytest.mark.parametrize(("one", "other", "shared"), [(None, None, 96), ("a", "a", 96), ("a", "b", 0), (None, "a", 0)])
def test_a_prefix_is_read_again_under_the_same_adapter_only(one: str | None, other: str | None, shared: int) -> None:
    driver = Driver(20, limits())
    for adapter in (one, other):
        last = sequence([1] * 100, adapter=adapter)
        driver.scheduler.add(last)
        driver.drain(50)
    assert last.num_cached == shared


def test_what_drafts_have_filled_is_read_again() -> None:
    """A second turn whose prompt is the first one's text finds all its full blocks."""
    driver = Driver(20, limits())
    first = sequence([1] * 40, 90)
    driver.scheduler.add(first)
    while first.row.is_live:
        driver.step(num_drafts=6)
    again = sequence(first.row.tokens.tolist())
    driver.scheduler.add(again)
    driver.step()
    assert again.num_cached == 128


def test_drafts_take_no_block_from_anybody() -> None:
    """One block is free: fifty guesses would need two, ten need it."""
    driver = Driver(3, limits(max_step_tokens=128))
    first, second = sequence([1] * 20, 60, at_s=0.0), sequence([2] * 20, 60, at_s=1.0)
    driver.scheduler.add(first)
    driver.scheduler.add(second)
    driver.step()
    plan = driver.step(num_drafts=50)
    assert [(chunk.sequence, chunk.drafts) for chunk in plan.chunks] == [(first, ()), (second, ())]
    assert driver.scheduler.num_preemptions == 0
    plan = driver.step(num_drafts=15)
    assert [len(chunk.drafts) for chunk in plan.chunks] == [15, 0]
    assert driver.scheduler.num_preemptions == 0


@pytest.mark.parametrize(("num_prompt", "num_known"), [(30, 0), (31, 0), (32, 32), (63, 32), (64, 64), (100, 64)])
def test_only_what_is_computed_to_its_end_is_read_again(num_prompt: int, num_known: int) -> None:
    """Of a sequence that leaves after its first step, which computes at most 64 tokens, others read whole blocks."""
    driver = Driver(20, limits(max_step_tokens=64))
    gone = sequence(range(num_prompt))
    driver.scheduler.add(gone)
    driver.step()
    gone.row.dropped = True
    driver.scheduler.remove(gone)
    reader = sequence([*gone.row.tokens.tolist(), *range(40)])
    driver.scheduler.add(reader)
    driver.step()
    assert reader.num_cached == num_known


def test_adapters_without_a_place_keep_others_out_but_not_those_who_have_one() -> None:
    """One place: the holder is preempted while a better ranked one waits for its place, and must finish first."""
    holder, wants = sequence([1] * 10, 60, at_s=1.0, adapter="a"), sequence([2] * 10, at_s=0.0, adapter="b")
    later, base = sequence([3] * 10, at_s=2.0, adapter="a"), sequence([4] * 10, at_s=3.0)
    places: list[Sequence] = []

    def may_join(one: Sequence, places_are_short: bool) -> bool:
        adapter = one.row.request.adapter
        if adapter is None or one in places:
            return True
        places[:] = [holds for holds in places if holds.row.is_live]
        is_free = all(holds.row.request.adapter == adapter for holds in places)
        if not places_are_short and is_free:
            places.append(one)
        return one in places

    driver = Driver(12, limits(), may_join=may_join)
    driver.scheduler.add(holder)
    driver.step()
    driver.scheduler._preempt(holder)
    for one in (wants, later, base):
        driver.scheduler.add(one)
    driver.step()
    assert [one.is_running for one in (holder, wants, later, base)] == [True, False, False, True]
    driver.drain(200)


@given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.integers(1, 200))
def test_prompt_logits_come_from_nobodys_cache_and_in_bounded_chunks(lengths: list[int], budget: int) -> None:
    driver = Driver(64, limits(max_step_tokens=budget))
    crowd = [sequence([1] * length, 1, prompt_logprobs=0) for length in lengths]
    for one in crowd:
        driver.scheduler.add(one)
    while driver.scheduler.has_work:
        assert all(chunk.count <= 128 for chunk in driver.step().chunks)
    assert [one.num_cached for one in crowd] == [0] * len(crowd)


@pytest.mark.parametrize("name", ["max_running", "max_step_tokens"])
def test_limits_are_checked_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        StepLimits(**{name: 0})
