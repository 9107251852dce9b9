"""Blocks of KV memory: each is in one state, and a name stands for one prefix under one adapter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS, BlockPool, block_digest, root_digest

NUM_BLOCKS = 6


class Pool(RuleBasedStateMachine):
    """A pool beside a model of it that only counts: who holds what, which names there are, and their last use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.idle: list[int] = []

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def take(self, count: int) -> None:
        held = {block for table in self.tables for block in table}
        blocks = self.pool.take(count)
        assert (blocks is None) == (count > NUM_BLOCKS - len(held))
        if blocks is None:
            return
        assert len(set(blocks)) == count
        assert not held & set(blocks), "a held block was given away"
        evicted = [block for block in blocks if block in self.names]
        assert evicted == self.idle[: len(evicted)], "the longest unused prefix gives way first"
        assert not evicted or set(self.idle) | held | set(blocks) == set(range(NUM_BLOCKS)), "free ones come first"
        for block in evicted:
            self.idle.remove(block)
            assert self.pool.find(self.names.pop(block)) is None
        self.tables.append(blocks)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.sampled_from([bytes([n]) for n in range(5)]))
    def name(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        is_news = name not in self.names.values() and block not in self.names
        self.pool.name(block, name)
        if is_news:
            self.names[block] = name

    @rule(name=st.sampled_from([bytes([n]) for n in range(5)]))
    def share(self, name: bytes) -> None:
        block = self.pool.find(name)
        assert block == next((block for block, known in self.names.items() if known == name), None)
        if block is not None:
            assert self.pool.num_retained([block]) == (block in self.idle)
            self.pool.hold([block])
            self.tables.append([block])
            if block in self.idle:
                self.idle.remove(block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        still_held = {block for other in self.tables for block in other}
        self.idle += [block for block in reversed(table) if block in self.names and block not in still_held]

    @rule()
    def forget(self) -> None:
        self.pool.forget_prefixes()
        self.names, self.idle = {}, []

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_held == len({block for table in self.tables for block in table})


TestPool = Pool.TestCase

tokens = st.lists(st.integers(0, 3), min_size=BLOCK_TOKENS, max_size=BLOCK_TOKENS).map(np.array)
prefixes = st.tuples(st.sampled_from([None, "a", "b", "a" * 64, "b" * 64]), st.lists(tokens, max_size=3))


@given(prefixes, prefixes)
def test_names_are_equal_for_equal_prefixes_and_no_others(
    one: tuple[str | None, list[np.ndarray]],  # type: ignore[type-arg]
    other: tuple[str | None, list[np.ndarray]],  # type: ignore[type-arg]
) -> None:
    digests = []
    for adapter, blocks in (one, other):
        digest = root_digest(adapter)
        for block in blocks:
            digest = block_digest(digest, block)
        digests.append(digest)
    is_same = one[0] == other[0] and [b.tolist() for b in one[1]] == [b.tolist() for b in other[1]]
    assert (digests[0] == digests[1]) == is_same


def test_a_pool_has_blocks() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockPool(0)


def test_of_one_prefix_the_end_is_forgotten_first() -> None:
    pool = BlockPool(3)
    table = pool.take(3)
    assert table is not None
    for number, block in enumerate(table):
        pool.name(block, bytes([number]))
    pool.release(table)
    pool.take(1)
    assert [pool.find(bytes([number])) is not None for number in range(3)] == [True, True, False]
