"""Ways of keeping keys and values, each with the attention that reads it: what kv_layout measures.

dense           a slot for each row, as wide as the longest row; torch's scaled_dot_product_attention, query heads by
                ``enable_gqa``
dense_grouped   the same slots; the query heads of one key head go as several queries of one head
concatenated    left-padded, made anew by torch.cat at every token, as transformers' DynamicCache does; then as dense
gathered        blocks, copied into a rectangle first: GpuMemory with gathered_attention
blocks          blocks read where they are: CpuMemory, or GpuMemory with Triton's kernels

Shapes: R rows, one new token each; C tokens of the longest, H query heads in groups of G for each of K key heads, D
head size, B blocks, L tokens in a block.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.gpu_memory import GpuMemory, new_gpu_memory
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import AttentionRule, CpuMemory, LayerShape, Layout

# Of the largest expected item; bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Pair = tuple[torch.Tensor, torch.Tensor]


class WrongAttention(Exception):
    """A side does not attend as it should: its figures mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The attention of one layer."""

    num_query_heads: int
    num_heads: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One decoding step: row r sees ``lengths[r]`` tokens, the last of which is new. ``num_layers`` have memory of
    their own, so that none finds its own in a cache.
    """

    shape: Shape
    lengths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    num_layers: int
    seed: int

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether nothing is padded."""
        return min(self.lengths) == self.longest

    @property
    def rule(self) -> AttentionRule:
        return AttentionRule(scale=self.shape.size**-0.5)

    def bytes_of(self, num_tokens: int) -> int:
        """Keys and values of so many tokens in one layer."""
        return 2 * num_tokens * self.shape.num_heads * self.shape.size * self.dtype.itemsize

    def states(self, num_heads: int, num_tokens: int, seed: int) -> torch.Tensor:
        """Random ones ``[R, heads, tokens, D]`` on the host."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + seed)
        shape = (len(self.lengths), num_heads, num_tokens, self.shape.size)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def past(self, layer: int) -> Pair:
        """Keys and values ``[R, K, C, D]`` of a layer; from each row's last token on they mean nothing."""
        num_heads = self.shape.num_heads
        return (
            self.states(num_heads, self.longest, 2 * layer + 3),
            self.states(num_heads, self.longest, 2 * layer + 4),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What a model hands over at a step: queries ``[R, H, D]``, keys and values ``[R, K, D]`` of the new tokens."""

    queries_RHD: torch.Tensor
    keys_RKD: torch.Tensor
    values_RKD: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> Step:
        heads = (case.shape.num_query_heads, case.shape.num_heads, case.shape.num_heads)
        return cls(*(case.states(num, 1, seed)[:, :, 0].contiguous().to(case.device) for seed, num in enumerate(heads)))


class Side(Protocol):
    """A layout and its attention. ``held_bytes``: what one layer's keys and values take."""

    held_bytes: int

    def fill(self, layer: int, past: Pair) -> None:
        """Take over what is there before the step."""

    def begin(self) -> None:
        """What is done once for all layers of a step."""

    def attend(self, layer: int, step: Step) -> torch.Tensor:
        """Write the new keys and values and attend, ``[R, H, D]``."""


class _Dense:
    def __init__(self, case: Case, *, is_grouped: bool) -> None:
        self._case = case
        self._is_grouped = is_grouped
        self._layers: list[Pair | None] = [None] * case.num_layers
        self.held_bytes = case.bytes_of(len(case.lengths) * case.longest)

    def fill(self, layer: int, past: Pair) -> None:
        keys, values = (states.to(self._case.device, copy=True) for states in past)
        self._layers[layer] = keys, values

    def begin(self) -> None:
        case = self._case
        self._rows = torch.arange(len(case.lengths), device=case.device)
        self._places = torch.tensor(case.lengths, device=case.device) - 1
        self._mask = _mask(case, self._places[:, None] >= torch.arange(case.longest, device=case.device))

    def attend(self, layer: int, step: Step) -> torch.Tensor:
        pair = self._layers[layer]
        assert pair is not None
        keys_RKCD, values_RKCD = pair
        keys_RKCD[self._rows, :, self._places] = step.keys_RKD
        values_RKCD[self._rows, :, self._places] = step.values_RKD
        if not self._is_grouped:
            return _attention(self._case, step.queries_RHD, keys_RKCD, values_RKCD, self._mask)
        num_rows, _, size = step.queries_RHD.shape
        queries_RKGD = step.queries_RHD.view(num_rows, self._case.shape.num_heads, -1, size)
        found_RKGD = scaled_dot_product_attention(
            queries_RKGD, keys_RKCD, values_RKCD, self._mask, scale=self._case.rule.scale
        )
        return found_RKGD.flatten(1, 2)


class _Concatenated:
    def __init__(self, case: Case) -> None:
        self._case = case
        self._layers: list[Pair | None] = [None] * case.num_layers
        # What is made is kept until it is made anew, as a cache keeps it.
        self._made: list[Pair | None] = [None] * case.num_layers
        self.held_bytes = case.bytes_of(len(case.lengths) * case.longest)

    def fill(self, layer: int, past: Pair) -> None:
        keys, values = (self._left_padded(states).to(self._case.device) for states in past)
        self._layers[layer] = keys, values

    def begin(self) -> None:
        case = self._case
        firsts = case.longest - torch.tensor(case.lengths, device=case.device)
        self._mask = _mask(case, firsts[:, None] <= torch.arange(case.longest, device=case.device))

    def attend(self, layer: int, step: Step) -> torch.Tensor:
        pair = self._layers[layer]
        assert pair is not None
        new = (step.keys_RKD, step.values_RKD)
        keys, values = (torch.cat([old, token[:, :, None]], dim=2) for old, token in zip(pair, new, strict=True))
        self._made[layer] = keys, values
        return _attention(self._case, step.queries_RHD, keys, values, self._mask)

    def _left_padded(self, states_RKCD: torch.Tensor) -> torch.Tensor:
        width = self._case.longest - 1
        padded = torch.zeros_like(states_RKCD[:, :, :width])
        for row, length in enumerate(self._case.lengths):
            padded[row, :, width + 1 - length :] = states_RKCD[row, :, : length - 1]
        return padded


class _InBlocks:
    """Blocks lie in the order of chance, as they do after some hours."""

    def __init__(self, case: Case, new_memory: Callable[[list[LayerShape], int], CpuMemory | GpuMemory]) -> None:
        counts = [-(-length // BLOCK_TOKENS) for length in case.lengths]
        self._is_used_RB = np.arange(max(counts)) < np.array(counts)[:, None]
        order = list(range(sum(counts)))
        random.Random(case.seed).shuffle(order)
        tables_RB = np.zeros(self._is_used_RB.shape, dtype=np.int32)
        tables_RB[self._is_used_RB] = order
        self._layout = Layout(
            rows_N=np.arange(len(counts), dtype=np.int32),
            positions_N=np.array(case.lengths, dtype=np.int32) - 1,
            tables_SB=tables_RB,
            starts=tuple(range(len(counts) + 1)),
        )
        shape = LayerShape(num_heads=case.shape.num_heads, key_size=case.shape.size, value_size=case.shape.size)
        self._case, self._blocks = case, torch.tensor(order)
        self._memory = new_memory([shape] * case.num_layers, len(order))
        self.held_bytes = case.bytes_of(len(order) * BLOCK_TOKENS)

    def fill(self, layer: int, past: Pair) -> None:
        for pool, states_RKCD, is_keys in zip(self._pools(layer), past, (True, False), strict=True):
            states_BKLD = self._cut(states_RKCD)
            is_turned = is_keys and isinstance(self._memory, CpuMemory)
            states = states_BKLD.transpose(2, 3) if is_turned else states_BKLD
            pool[self._blocks.to(pool.device)] = states.to(pool.device)

    def begin(self) -> None:
        self._memory.lay_out(self._layout)

    def attend(self, layer: int, step: Step) -> torch.Tensor:
        queries, keys, values = (
            each.transpose(0, 1)[None] for each in (step.queries_RHD, step.keys_RKD, step.values_RKD)
        )
        return self._memory.attend(layer, queries, keys, values, self._case.rule)[0]

    def _pools(self, layer: int) -> Pair:
        pools = self._memory._keys[layer], self._memory._values[layer]
        keys, values = (
            torch.from_numpy(pool).view(self._case.dtype) if isinstance(pool, np.ndarray) else pool for pool in pools
        )
        return keys, values

    def _cut(self, states_RKCD: torch.Tensor) -> torch.Tensor:
        """The rows' blocks ``[B, K, L, D]``, in the order of their rows."""
        num_rows, num_heads, length, size = states_RKCD.shape
        num_blocks = self._is_used_RB.shape[1]
        padded = pad(states_RKCD, (0, 0, 0, num_blocks * BLOCK_TOKENS - length))
        states_RBKLD = padded.view(num_rows, num_heads, num_blocks, BLOCK_TOKENS, size).transpose(1, 2)
        return states_RBKLD[torch.from_numpy(self._is_used_RB)]


def _gathered(case: Case) -> Side:
    return _InBlocks(
        case,
        lambda shapes, num_blocks: GpuMemory(
            shapes, num_blocks, case.dtype, [case.device] * len(shapes), gathered_attention
        ),
    )


def _read_in_place(case: Case) -> Side:
    if case.device.type == "cpu":
        return _InBlocks(case, lambda shapes, num_blocks: CpuMemory(shapes, num_blocks, case.dtype))
    return _InBlocks(
        case, lambda shapes, num_blocks: new_gpu_memory(shapes, num_blocks, case.dtype, [case.device] * len(shapes))
    )


OURS = "blocks"
SIDES: Mapping[str, Callable[[Case], Side]] = {
    OURS: _read_in_place,
    "dense": lambda case: _Dense(case, is_grouped=False),
    "dense_grouped": lambda case: _Dense(case, is_grouped=True),
    "concatenated": _Concatenated,
    "gathered": _gathered,
}


def expected(case: Case, layer: int, step: Step) -> torch.Tensor:
    """Attention as it is defined, row by row in float64, ``[R, H, D]``."""
    keys_RKCD, values_RKCD = case.past(layer)
    found = []
    for row, length in enumerate(case.lengths):
        keys_KTD, values_KTD = (
            torch.cat([old[row, :, : length - 1], new[row].cpu()[:, None]], dim=1).double()
            for old, new in ((keys_RKCD, step.keys_RKD), (values_RKCD, step.values_RKD))
        )
        queries_KGD = step.queries_RHD[row].cpu().double().view(case.shape.num_heads, -1, case.shape.size)
        scores_KGT = queries_KGD @ keys_KTD.transpose(1, 2) / math.sqrt(case.shape.size)
        found.append((scores_KGT.softmax(dim=-1) @ values_KTD).flatten(0, 1))
    return torch.stack(found)


def checked(name: str, side: Side, case: Case, step: Step) -> float:
    """The largest difference from float64, over the largest item; raises WrongAttention where it is too large."""
    side.begin()
    differences = []
    for layer in sorted({0, case.num_layers - 1}):
        right = expected(case, layer, step)
        found = side.attend(layer, step).cpu().double()
        differences.append(float((found - right).abs().max() / right.abs().max()))
    worst = max(differences)
    allowed = TOLERANCE[case.dtype]
    if not worst <= allowed:
        raise WrongAttention(f"{name} differs from float64 by {worst:.2g} of the largest item; at most {allowed:g}")
    return float(f"{worst:.2g}")


def _mask(case: Case, is_seen_RC: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores ``[R, 1, 1, C]``; None where everything is seen."""
    if case.is_even:
        return None
    mask_RC = torch.zeros(is_seen_RC.shape, dtype=case.dtype, device=case.device)
    return mask_RC.masked_fill_(~is_seen_RC, -torch.inf)[:, None, None]


def _attention(
    case: Case, queries_RHD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    found_RH1D = scaled_dot_product_attention(
        queries_RHD[:, :, None], keys, values, mask, scale=case.rule.scale, enable_gqa=True
    )
    return found_RH1D[:, :, 0]
