"""KV memory for GPUs, on a CPU: the torch kernels as they are, the Triton ones under Triton's interpreter (skipped
where triton is missing), both against attention written out token by token.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.gpu_memory import GpuMemory, problem_with
from slipstream_server.inference.engine.gpu_tables import num_decoding_rows
from slipstream_server.inference.engine.paged_attention import AttentionRule, LayerShape, Layout

CPU = torch.device("cpu")
MIXED = ((1, 1, 1, 5, 40), (70, 33, 31, 64, 20))
DECODING = ((1, 1, 1), (130, 33, 2))


@pytest.fixture(params=["gathered", "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "gathered":
        return gathered_attention
    return triton_kernels()


def triton_kernels() -> ModuleType:
    """The kernels in the interpreter, which Triton wants to be told of before its first import: make test-kernels."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton, and TRITON_INTERPRET=1 from the start")
    from slipstream_server.inference.engine import gpu_attention

    return gpu_attention


class Case:
    """Sequences with blocks in disorder: what they hold, written out, and the memory under test."""

    def __init__(
        self, kernels: ModuleType, heads: tuple[int, int], size: int, dtype: torch.dtype, value_size: int = 0
    ) -> None:
        self.num_query_heads, self.num_heads = heads
        self.size, self.value_size, self.dtype = size, value_size or size, dtype
        self.generator = torch.Generator().manual_seed(3)
        shape = LayerShape(num_heads=self.num_heads, key_size=size, value_size=self.value_size)
        self.memory = GpuMemory([shape], 40, dtype, [CPU], kernels)
        for states in (*self.memory._keys, *self.memory._values):
            # Whatever is read without having been written shows.
            states.fill_(torch.nan)
        self.blocks = np.random.default_rng(3).permutation(40).astype(np.int32).reshape(5, 8)
        self.held: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], [], [], [], []]

    def step(self, counts: Sequence[int], firsts: Sequence[int], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the memory answers, and what plain attention does, ``[N, H, D]``."""
        layout = layout_of(counts, firsts, self.blocks)
        num_tokens = layout.starts[-1]
        queries = self._random(num_tokens, self.num_query_heads)
        keys, wide = self._random(num_tokens, self.num_heads), self._random(num_tokens, self.num_heads)
        values = wide[..., : self.value_size]
        self.memory.lay_out(layout)
        rule = AttentionRule(scale=0.3, **options)
        found = self.memory.attend(0, queries, keys, values, rule)[0]
        outputs = []
        for row, (start, end) in enumerate(zip(layout.starts, layout.starts[1:], strict=False)):
            for n in range(start, end):
                self.held[row].append((keys[0, :, n], values[0, :, n]))
                outputs.append(self._by_hand(queries[0, :, n], self.held[row], rule))
        return found, torch.stack(outputs)

    def _random(self, num_tokens: int, num_heads: int) -> torch.Tensor:
        states = torch.randn(1, num_tokens, num_heads, self.size, generator=self.generator, dtype=self.dtype)
        return states.transpose(1, 2)

    def _by_hand(
        self, query_HD: torch.Tensor, held: Sequence[tuple[torch.Tensor, ...]], rule: AttentionRule
    ) -> torch.Tensor:
        keys_TKD, values_TKD = (torch.stack(states) for states in zip(*held[-rule.window :], strict=True))
        outputs = []
        for head in range(self.num_query_heads):
            of = head * self.num_heads // self.num_query_heads
            scores_T = keys_TKD[:, of] @ query_HD[head] * rule.scale
            if rule.softcap:
                scores_T = rule.softcap * torch.tanh(scores_T / rule.softcap)
            outputs.append(scores_T.softmax(dim=0) @ values_TKD[:, of])
        return torch.stack(outputs)


def layout_of(counts: Sequence[int], firsts: Sequence[int], blocks: Any) -> Layout:
    spans = [np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    return Layout(
        rows_N=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        positions_N=np.concatenate(spans).astype(np.int32),
        tables_SB=blocks[: len(counts)],
        starts=tuple(int(start) for start in np.concatenate([[0], np.cumsum(counts)])),
    )


@pytest.mark.parametrize(("counts", "befores"), [MIXED, DECODING])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 0.0), (7, 3.0)])
def test_every_token_sees_its_own_sequence_up_to_itself(
    kernels: ModuleType, counts: tuple[int, ...], befores: tuple[int, ...], window: int, softcap: float
) -> None:
    case = Case(kernels, heads=(6, 2), size=16, dtype=torch.float64)
    tolerance = 1e-6 if softcap else 1e-7
    for step in ((befores, (0,) * len(befores)), (counts, befores)):
        found, expected = case.step(*step, window=window, softcap=softcap)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_a_context_in_parts_is_the_same(kernels: ModuleType, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_splits", lambda *facts: parts)
    case = Case(kernels, heads=(3, 3), size=24, dtype=torch.float32)
    counts, befores = DECODING
    case.step(befores, (0, 0, 0))
    for number in range(2):
        found, expected = case.step(counts, [before + number for before in befores])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_keys_wider_than_values(kernels: ModuleType) -> None:
    """As multi-head latent attention has them: together they are no power of two."""
    case = Case(kernels, heads=(2, 2), size=192, dtype=torch.float32, value_size=128)
    counts, befores = DECODING
    case.step(befores, (0, 0, 0))
    found, expected = case.step(counts, befores)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_rows_with_drafts_among_those_that_decode(kernels: ModuleType) -> None:
    case = Case(kernels, heads=(4, 1), size=8, dtype=torch.float32)
    case.step((5, 40, 3, 2), (0, 0, 0, 0))
    found, expected = case.step((1, 4, 1, 3), (5, 40, 3, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_decoding_rows_end_at_the_first_that_brings_more() -> None:
    blocks = np.zeros((4, 2), dtype=np.int32)
    assert num_decoding_rows(layout_of((1, 1, 3, 1), (4, 4, 0, 4), blocks)) == 2
    assert num_decoding_rows(layout_of((1, 1), (4, 4), blocks)) == 2
    assert num_decoding_rows(layout_of((2,), (0,), blocks)) == 0


def test_contexts_are_split_to_fill_the_device_and_no_further() -> None:
    splits_for = triton_kernels().splits_for
    assert splits_for(num_programs=8, most_tokens=100_000, num_processors=132) == 16
    assert splits_for(num_programs=100, most_tokens=100_000, num_processors=132) == 4
    assert splits_for(num_programs=8, most_tokens=600, num_processors=132) == 2
    assert splits_for(num_programs=1000, most_tokens=100_000, num_processors=132) == 1
    assert splits_for(num_programs=1, most_tokens=3, num_processors=132) == 1


def test_kernels_are_tried_before_they_are_used(kernels: ModuleType) -> None:
    assert problem_with(kernels, CPU) is None


def test_kernels_that_fail_or_answer_wrongly_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gathered_attention, "attend", lambda queries_HND, *rest: 2 * queries_HND.transpose(0, 1))
    assert problem_with(gathered_attention, CPU) == "they answer wrongly"
    monkeypatch.setattr(gathered_attention, "attend", fail)
    assert problem_with(gathered_attention, CPU) == "RuntimeError: no compiler"
