"""The continuous scheduler's promises, with rows whose tokens are drawn from a list: no model, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slipstream_server.inference.engine.continuous_scheduler import (
    PRIORITY_S,
    Chunk,
    ContinuousScheduler,
    Plan,
    StepLimits,
)
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS, BlockPool
from slipstream_server.inference.engine.sequences import Sequence
from slipstream_server.inference.generation import AdapterPin, GenerationRequest, Sampling, Stopping

_ids = count(1)
ADAPTERS = {name: AdapterPin(version=name, digest=name, folder="") for name in "ab"}


def sequence(
    prompt: Any, max_new_tokens: int = 3, *, at_s: float = 0.0, adapter: str | None = None, **others: Any
) -> Sequence:
    request = GenerationRequest(
        id=next(_ids), prompt_token_ids=tuple(prompt), sampling=Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens), adapter=ADAPTERS[adapter] if adapter else None, **others,
    )  # fmt: skip
    row = Row(request, 0, np.array(request.prompt_token_ids, dtype=np.int64))
    return Sequence(Generation(request, [row]), row, at_s)


def rank(one: Sequence) -> tuple[float, int]:
    return (one.arrival_s + PRIORITY_S * one.row.request.priority, one.row.request.id)


class Written:
    """KV memory that remembers which token of which prefix was written where, as the model would."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}

    def run(self, chunk: Chunk) -> None:
        """Write the chunk's tokens, having read all before them."""
        one = chunk.sequence
        adapter = one.row.request.adapter
        tokens = (*one.row.tokens[: chunk.start + chunk.count].tolist(), *chunk.drafts)
        content = hash(adapter and adapter.digest)
        for position, token in enumerate(tokens):
            place = (one.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
            content = hash((content, token))
            if position >= chunk.start:
                self.places[place] = content
            else:
                assert self.places[place] == content, "a sequence reads what is not its own past"


class Driver:
    """Runs plans as the engine does; every row's next token is a function of its tokens alone."""

    def __init__(self, num_blocks: int, limits: StepLimits, **options: Any) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks)
        self.scheduler = ContinuousScheduler(limits, self.pool, **options)
        self.written = Written()
        self.is_admitted: set[int] = set()

    def step(self, num_drafts: int = 0) -> Plan:
        waiting = {id(one) for one in self.scheduler if not one.is_running}
        best = min((one for one in self.scheduler if one.is_running), key=rank, default=None)
        before = None if best is None else (best.num_computed, best.num_tokens)
        plan = self.scheduler.plan(lambda one: guess(one, num_drafts))
        self.scheduler.check_integrity()
        self._check(plan, waiting)
        for chunk in plan.chunks:
            self.written.run(chunk)
        for chunk in plan.chunks:
            self._finish(chunk)
        if best is not None and before is not None:
            assert best.is_running or not best.row.is_live, "the best ranked had to give way"
            assert (best.num_computed, best.num_tokens) > before or not best.row.is_live, "it did not advance"
        assert plan.chunks or not waiting, "somebody waits and nobody runs"
        self.scheduler.check_integrity()
        return plan

    def _check(self, plan: Plan, waiting: set[int]) -> None:
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks), "two chunks of one sequence"
        decoding = sum(chunk.num_tokens for chunk in plan.chunks if is_decode(chunk))
        reading = sum(chunk.num_tokens for chunk in plan.chunks if not is_decode(chunk))
        newcomers = [chunk for chunk in plan.chunks if chunk.sequence in plan.newcomers]
        assert len(newcomers) == len(plan.newcomers), "a newcomer has nothing to do"
        assert decoding + reading <= decoding + max(BLOCK_TOKENS, self.limits.max_step_tokens - decoding)
        assert self.scheduler.num_running <= self.limits.max_running
        for one in plan.newcomers:
            assert id(one) in waiting or one.row.request.id in self.is_admitted
            assert one.num_cached is not None
            assert one.num_cached < one.num_tokens, "nothing is left whose logits could be read"
            self.is_admitted.add(one.row.request.id)
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.num_computed
            assert 0 < chunk.count <= chunk.sequence.num_to_compute
            assert -(-(chunk.start + chunk.num_tokens) // BLOCK_TOKENS) <= len(chunk.sequence.blocks)

    def _finish(self, chunk: Chunk) -> None:
        one = chunk.sequence
        if not chunk.gives_token:
            self.scheduler.commit(chunk)
            return
        num_right = 0
        one.row.append(following(one.row.tokens))
        while num_right < len(chunk.drafts) and one.row.is_live and one.row.tokens[-1] == chunk.drafts[num_right]:
            one.row.append(following(one.row.tokens))
            num_right += 1
        self.scheduler.commit(chunk, num_right)
        if not one.row.is_live:
            self.scheduler.remove(one)

    def drain(self, most_steps: int) -> int:
        steps = 0
        while self.scheduler.has_work:
            assert steps < most_steps, "the scheduler does not come to an end"
            self.step()
            steps += 1
        return steps


def is_decode(chunk: Chunk) -> bool:
    return chunk.count == 1 and chunk.gives_token


def following(tokens: Any) -> int:
    return int(tokens[-3:].sum() + len(tokens)) % 5


def guess(one: Sequence, most: int) -> tuple[int, ...]:
    """Right guesses, but for the last one; none beyond what may be generated."""
    room = min(most, one.row.request.stopping.max_new_tokens - one.row.num_generated - 1)
    tokens = one.row.tokens
    for _ in range(room):
        tokens = np.append(tokens, following(tokens))
    guesses = [int(token) for token in tokens[one.num_tokens :]]
    return (*guesses[:-1], guesses[-1] + 1) if len(guesses) > 1 else tuple(guesses)


def most_steps_for(sequences: list[Sequence]) -> int:
    """One after the other, a block of a prompt or one token at a time, and that again after every preemption."""
    each = [len(one.row.request.prompt_token_ids) + one.row.request.stopping.max_new_tokens for one in sequences]
    return 10 + sum(each) * (1 + len(each))


class Crowd(RuleBasedStateMachine):
    """Arrivals, cancels and steps in any order, in a pool that one long sequence can fill."""

    driver: Driver
    now_s: float
    alive: list[Sequence]

    @initialize(
        num_blocks=st.integers(2, 8), max_running=st.integers(1, 5), max_step_tokens=st.integers(1, 130),
        prefix_caching=st.booleans(),
    )  # fmt: skip
    def begin(self, num_blocks: int, max_running: int, max_step_tokens: int, prefix_caching: bool) -> None:
        limits = StepLimits(max_running=max_running, max_step_tokens=max_step_tokens)
        self.driver = Driver(num_blocks, limits, prefix_caching=prefix_caching)
        self.now_s = 0.0
        self.alive = []

    @rule(
        size=st.floats(0, 1), new=st.integers(1, 70), stem=st.integers(0, 1), own=st.integers(0, 40),
        priority=st.integers(0, 2), adapter=st.sampled_from([None, None, "a", "b"]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
    )  # fmt: skip
    def arrive(
        self, size: float, new: int, stem: int, own: int, priority: int, adapter: str | None,
        prompt_logprobs: int | None,
    ) -> None:  # fmt: skip
        """Prompts share one of two stems, and go their own way at the end."""
        most = self.driver.pool.num_blocks * BLOCK_TOKENS
        new = min(new, most - 1)
        length = 1 + round(size * (most - new - 1))
        prompt = [(stem + 1) * (n % 7) % 5 for n in range(length)]
        prompt[max(0, length - own) :] = [own % 5] * min(own, length)
        one = sequence(
            prompt, new, at_s=self.now_s, adapter=adapter, priority=priority, prompt_logprobs=prompt_logprobs
        )
        self.driver.scheduler.add(one)
        self.alive.append(one)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.alive))
        one.row.dropped = True
        self.driver.scheduler.remove(one)

    @rule(seconds=st.sampled_from([0.1, 4.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(num_drafts=st.sampled_from([0, 0, 3, 40]), steps=st.integers(1, 6))
    def step(self, num_drafts: int, steps: int) -> None:
        for _ in range(steps):
            self.driver.step(num_drafts)

    @invariant()
    def blocks_agree(self) -> None:
        if hasattr(self, "driver"):
            self.alive = [one for one in self.alive if one.row.is_live]
            self.driver.scheduler.check_integrity()

    def teardown(self) -> None:
        """Everybody comes to an end, and nothing is held then."""
        if not hasattr(self, "driver"):
            return
        self.driver.drain(most_steps_for(self.alive))
        assert self.driver.pool.num_held == 0
        assert not any(one.row.is_live for one in self.alive if not one.row.dropped)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def limits(**values: int) -> StepLimits:
    return StepLimits(**{"max_running": 8, "max_step_tokens": 64, **values})


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
