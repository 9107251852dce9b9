"""The cache that grows in place against transformers' own, under any order of appends, departures and trims."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.driving import tiny_model
from transformers.cache_utils import DynamicLayer

from slipstream_server.inference.engine.cache import GrowingLayer, new_cache, select_rows, trim_columns

steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("keep"), st.integers(0, 10**6)),
        st.tuples(st.just("trim"), st.integers(1, 2)),
    ),
    max_size=14,
)


@settings(max_examples=100, deadline=None)
@given(steps, st.integers(1, 5), st.integers(1, 6))
def test_growing_equals_concatenating(script: list[tuple[str, int]], rows: int, spare: int) -> None:
    ours, theirs = GrowingLayer(spare), DynamicLayer()
    generator = torch.Generator().manual_seed(0)

    def append(columns: int) -> None:
        keys, values = torch.randn(2, rows, 2, columns, 3, generator=generator)
        for ours_now, theirs_now in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(ours_now, theirs_now)

    append(3)
    for action, number in script:
        if action == "append":
            append(number)
        elif action == "keep":
            order = torch.tensor([(number // 7**place) % rows for place in range(1 + number % 6)])
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
            rows = len(order)
        elif theirs.get_seq_length() > number:
            ours.trim(number)
            theirs.keys, theirs.values = theirs.keys[:, :, number:], theirs.values[:, :, number:]
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_appending_one_column_copies_no_other() -> None:
    layer = GrowingLayer(spare_columns=8)
    layer.update(*torch.randn(2, 2, 2, 5, 4))
    before = layer.keys.data_ptr()
    layer.update(*torch.randn(2, 2, 2, 1, 4))
    layer.reorder_cache(torch.tensor([1]))
    assert layer.keys.untyped_storage().data_ptr() == before


def test_only_plain_attention_layers_are_replaced() -> None:
    cache = new_cache(tiny_model("gemma3").config, 16)
    assert [type(layer) is GrowingLayer for layer in cache.layers] == [False, True]
    assert not trim_columns(cache, 1)
    select_rows(cache, [0])
