"""KV memory in blocks, and the attention that reads it: the door through which stock models use it.

A model whose attention goes through transformers' AttentionInterface is told to use ``ATTENTION``. From then on its
attention modules hand queries, keys and values of the step's tokens to the KV memory that ``seat`` has given them; no
cache object and no mask is needed: who sees what follows from positions and block tables alone.

    CpuMemory     Numba kernels on blocks (cpu_attention says why), prompts in tiles
    GpuMemory     Triton kernels on blocks, or plain torch on gathered ones (gpu_memory)

Engine thread. Shapes: N tokens of the step, S sequences, H query heads, K key heads, D head size, B blocks, L tokens
in a block, T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS

ATTENTION = "slipstream_paged"

SEAT = "slipstream_kv"

# The vectors of cpu_attention.
_HEAD_SIZE_MULTIPLE = 8

# From so many tokens of one sequence on that see so many, its blocks are gathered and attended to in tiles, each read
# once for many tokens: 256 tokens behind 1,000 take 7 ms instead of 20. Else blocks are read in place.
_TILED_FROM_TOKENS = 12
_TILED_FROM_SEEN = 256


# What attention functions are given by some models, and reading from blocks does not know.
_REFUSED_OPTIONS = ("s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices")


class UnsupportedAttention(Exception):
    """The model's attention wants something that reading from blocks does not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer keeps for a token: ``num_heads`` keys of ``key_size`` and values of ``value_size``."""

    num_heads: int
    key_size: int
    value_size: int

    def block_bytes(self, item_bytes: int) -> int:
        return BLOCK_TOKENS * self.num_heads * (self.key_size + self.value_size) * item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """How a layer attends: what products are multiplied by, how many of the last tokens are seen (0: all), and what
    bends the scores (0: nothing does).
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the step's tokens belong: token n is at ``positions_N[n]`` of sequence ``rows_N[n]``, whose blocks are
    ``tables_SB``. Tokens of one sequence are successive; ``starts`` says where each sequence begins, and the end.
    """

    rows_N: npt.NDArray[np.int32]
    positions_N: npt.NDArray[np.int32]
    tables_SB: npt.NDArray[np.int32]
    starts: tuple[int, ...]


class KVMemory(Protocol):
    """Keys and values of all layers."""

    def lay_out(self, layout: Layout) -> None:
        """The tokens of the step that comes."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:
        """Store keys and values ``[1, K, N, D]`` and attend with queries ``[1, H, N, D]``; the result is
        ``[1, N, H, D]``.
        """


class _Span:
    """The step's tokens of one sequence, where they stand among all; they see its tokens before position ``end``."""

    def __init__(self, layout: Layout, row: int) -> None:
        self.tokens = slice(layout.starts[row], layout.starts[row + 1])
        self.end = int(layout.positions_N[self.tokens.stop - 1]) + 1
        self.blocks = layout.tables_SB[row, : -(-self.end // BLOCK_TOKENS)].astype(np.int64)
        self._masks: dict[int, torch.Tensor] = {}

    def mask(self, window: int, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores ``[tokens, end]``: 0 where a token sees another, else less than any number."""
        if window not in self._masks:
            num_tokens = self.tokens.stop - self.tokens.start
            distance_TT = torch.arange(self.end - num_tokens, self.end)[:, None] - torch.arange(self.end)
            is_seen = (distance_TT >= 0) & (distance_TT < window) if window else distance_TT >= 0
            self._masks[window] = torch.zeros(is_seen.shape, dtype=dtype).masked_fill_(~is_seen, -torch.inf)
        return self._masks[window]


class CpuMemory:
    """Blocks in main memory, in bfloat16, float32 or float64 as the model is; of bfloat16, sums are in float32."""

    @staticmethod
    def fits(shapes: Sequence[LayerShape]) -> bool:
        """Whether the kernels can read such keys and values."""
        return all(shape.key_size == shape.value_size and not shape.key_size % _HEAD_SIZE_MULTIPLE for shape in shapes)

    def __init__(self, shapes: Sequence[LayerShape], num_blocks: int, dtype: torch.dtype) -> None:
        from slipstream_server.inference.engine import cpu_attention

        self._kernels = cpu_attention
        self._dtype = cpu_item_dtype(dtype)
        self._sums_dtype = torch.promote_types(self._dtype, torch.float32)
        self._scalar = numpy_items(torch.empty(0, dtype=self._sums_dtype)).dtype.type
        kind = numpy_items(torch.empty(0, dtype=self._dtype)).dtype
        # Zeroed pages cost nothing until they are written to.
        self._keys = [np.zeros((num_blocks, s.num_heads, s.key_size, BLOCK_TOKENS), kind) for s in shapes]
        self._values = [np.zeros((num_blocks, s.num_heads, BLOCK_TOKENS, s.value_size), kind) for s in shapes]
        self._layout: Layout | None = None

    def lay_out(self, layout: Layout) -> None:
        self._layout = layout
        seen_S = layout.positions_N[np.array(layout.starts[1:]) - 1] + 1
        is_tiled_S = (np.diff(layout.starts) >= _TILED_FROM_TOKENS) & (seen_S >= _TILED_FROM_SEEN)
        self._all_tokens = np.arange(len(layout.rows_N))
        self._untiled_tokens = np.flatnonzero(~is_tiled_S[layout.rows_N])
        self._spans = [_Span(layout, int(row)) for row in np.flatnonzero(is_tiled_S)]

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:
        keys_NKD, values_NKD = (numpy_items(_by_token(states, self._dtype)) for states in (keys, values))
        self._kernels.write(keys_NKD, values_NKD, *self.places(layer))
        queries_NHD = _by_token(queries, self._sums_dtype)
        return self.attend_written(layer, queries_NHD, rule).to(queries.dtype)[None]

    def places(self, layer: int) -> tuple[npt.NDArray[Any], ...]:
        """What kernels need to find the step's tokens in a layer: rows, positions, tables, keys, values."""
        layout = self._layout
        assert layout is not None
        return layout.rows_N, layout.positions_N, layout.tables_SB, self._keys[layer], self._values[layer]

    def attend_written(self, layer: int, queries_NHD: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
        """Outputs ``[N, H, D]``, where the step's keys and values are in their blocks already; all in float32."""
        outputs_NHD = torch.empty_like(queries_NHD)
        tokens, spans = (self._all_tokens, []) if rule.softcap else (self._untiled_tokens, self._spans)
        if len(tokens):
            self._kernels.attend(
                queries_NHD.numpy(),
                tokens,
                *self.places(layer),
                self._scalar(rule.scale),
                rule.window,
                self._scalar(rule.softcap),
                torch.get_num_threads(),
                outputs_NHD.numpy(),
            )
        for span in spans:
            outputs_NHD[span.tokens] = self._attend_tiled(layer, span, queries_NHD[span.tokens], rule)
        return outputs_NHD

    def _attend_tiled(self, layer: int, span: _Span, queries_THD: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
        """Outputs ``[T, H, D]`` of a prompt's tokens."""
        blocks = torch.from_numpy(span.blocks)
        keys_BKDL, values_BKLD = (
            torch.from_numpy(pool[layer]).view(self._dtype).index_select(0, blocks)
            for pool in (self._keys, self._values)
        )
        # What lies behind the sequence's end may be anything, and is cut off.
        keys_KTD = keys_BKDL.permute(1, 0, 3, 2).flatten(1, 2)[:, : span.end]
        values_KTD = values_BKLD.transpose(0, 1).flatten(1, 2)[:, : span.end]
        mask_TT = span.mask(rule.window, self._dtype)
        queries_1HTD = queries_THD.to(self._dtype).transpose(0, 1)[None]
        outputs_1HTD = torch.nn.functional.scaled_dot_product_attention(
            queries_1HTD, keys_KTD[None], values_KTD[None], mask_TT, scale=rule.scale, enable_gqa=True
        )
        return outputs_1HTD[0].transpose(0, 1)


class ShapeProbe:
    """Stands in for a memory during one forward, to learn what each layer keeps, where, and its rule."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.rules: dict[int, AttentionRule] = {}
        self.devices: dict[int, torch.device] = {}

    def lay_out(self, layout: Layout) -> None:
        return

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: AttentionRule
    ) -> torch.Tensor:
        shape = LayerShape(num_heads=keys.shape[1], key_size=keys.shape[3], value_size=values.shape[3])
        if layer in self.shapes:
            raise UnsupportedAttention(f"layer {layer} attends twice")
        self.shapes[layer] = shape
        self.rules[layer] = rule
        self.devices[layer] = keys.device
        group = queries.shape[1] // keys.shape[1]
        return values.repeat_interleave(group, dim=1).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Seat:
    """What an attention module needs to know: its memory, and its layer there."""

    memory: KVMemory
    layer: int


def seat(model: Any, memory: KVMemory) -> int:
    """Give every attention module of the model its place in ``memory``; how many there are."""
    modules = [
        module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int) and _attends(module)
    ]
    for module in modules:
        setattr(module, SEAT, Seat(memory, module.layer_idx))
    return len(modules)


def cpu_item_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model of ``dtype`` keeps its keys and values in on a CPU."""
    return dtype if dtype in (torch.float64, torch.bfloat16) else torch.float32


def numpy_items(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A contiguous tensor for compiled kernels: bfloat16, which numpy does not have, as the uint16 of its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _by_token(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return states[0].transpose(0, 1).to(dtype).contiguous()


def _attends(module: Any) -> bool:
    return "attention" in type(module).__name__.lower()


def _attend_from_blocks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of an attention function."""
    for name in _REFUSED_OPTIONS:
        if options.get(name) is not None:
            raise UnsupportedAttention(f"attention with {name}")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("attention that is not causal")
    place: Seat = getattr(module, SEAT)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rule = _rule(scale, sliding_window or 0, softcap or 0.0)
    return place.memory.attend(place.layer, query, key, value, rule), None


@cache
def _rule(scale: float, window: int, softcap: float) -> AttentionRule:
    """Made once for all layers that attend alike."""
    return AttentionRule(scale=scale, window=window, softcap=softcap)


AttentionInterface.register(ATTENTION, _attend_from_blocks)
