"""KV memory in blocks, and the attention that reads it: the door through which stock models use it.

A model whose attention goes through transformers' AttentionInterface is told to use ``ATTENTION``. From then on its
attention modules hand queries, keys and values of the step's tokens to the KV memory that ``seat`` has given them; no
cache object and no mask is needed: who sees what follows from positions and block tables alone.

    CpuMemory     Numba kernels on blocks (cpu_attention says why)
    TorchMemory   any device, plain torch: gathers each sequence's blocks

Engine thread. Shapes: N tokens of the step, S sequences, H query heads, K key heads, D head size, B blocks, L tokens
in a block, T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS

ATTENTION = "slipstream_paged"

_SEAT = "slipstream_kv"

# From so many tokens of one sequence on, its blocks are gathered and attended to in tiles, each read once for many
# tokens: 256 tokens behind 1,000 take 7 ms instead of 31. Below, blocks are read in place.
_TILED_FROM_TOKENS = 12


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
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """Store keys and values ``[1, K, N, D]`` and attend with queries ``[1, H, N, D]``; the result is
        ``[1, N, H, D]``. ``window`` and ``softcap`` 0: none.
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
            allowed = _allowed(num_tokens, self.end, window, torch.device("cpu"))
            zeros = torch.zeros((num_tokens, self.end), dtype=dtype)
            self._masks[window] = zeros if allowed is None else zeros.masked_fill_(~allowed, -torch.inf)
        return self._masks[window]


class CpuMemory:
    """Blocks in main memory, in float32 (float64 for models of that)."""

    def __init__(self, shapes: Sequence[LayerShape], num_blocks: int, dtype: torch.dtype) -> None:
        from slipstream_server.inference.engine import cpu_attention

        for shape in shapes:
            if shape.key_size != shape.value_size or shape.key_size % cpu_attention.HEAD_SIZE_MULTIPLE:
                raise UnsupportedAttention(f"head sizes of {shape.key_size} and {shape.value_size}")
        self._kernels = cpu_attention
        self._dtype = cpu_item_dtype(dtype)
        numpy_dtype = torch.empty(0, dtype=self._dtype).numpy().dtype
        self._scalar = numpy_dtype.type
        # Zeroed pages cost nothing until they are written to.
        self._keys = [np.zeros((num_blocks, s.num_heads, s.key_size, BLOCK_TOKENS), numpy_dtype) for s in shapes]
        self._values = [np.zeros((num_blocks, s.num_heads, BLOCK_TOKENS, s.value_size), numpy_dtype) for s in shapes]
        self._layout: Layout | None = None

    def lay_out(self, layout: Layout) -> None:
        self._layout = layout
        counts_S = np.diff(layout.starts)
        self._all_tokens = np.arange(len(layout.rows_N))
        self._few_tokens = np.flatnonzero(counts_S[layout.rows_N] < _TILED_FROM_TOKENS)
        self._spans = [_Span(layout, int(row)) for row in np.flatnonzero(counts_S >= _TILED_FROM_TOKENS)]

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        layout = self._layout
        assert layout is not None
        places = (layout.rows_N, layout.positions_N, layout.tables_SB)
        pools = (self._keys[layer], self._values[layer])
        queries_NHD = self._by_token(queries)
        self._kernels.write(self._by_token(keys).numpy(), self._by_token(values).numpy(), *places, *pools)
        outputs_NHD = torch.empty_like(queries_NHD)
        tokens, spans = (self._all_tokens, []) if softcap else (self._few_tokens, self._spans)
        if len(tokens):
            self._kernels.attend(
                queries_NHD.numpy(),
                tokens,
                *places,
                *pools,
                self._scalar(scale),
                window,
                self._scalar(softcap),
                torch.get_num_threads(),
                outputs_NHD.numpy(),
            )
        for span in spans:
            outputs_NHD[span.tokens] = self._attend_tiled(layer, span, queries_NHD[span.tokens], scale, window)
        return outputs_NHD.to(queries.dtype)[None]

    def _attend_tiled(
        self, layer: int, span: _Span, queries_THD: torch.Tensor, scale: float, window: int
    ) -> torch.Tensor:
        """Outputs ``[T, H, D]`` of a prompt's tokens."""
        blocks = torch.from_numpy(span.blocks)
        keys_BKDL = torch.from_numpy(self._keys[layer]).index_select(0, blocks)
        values_BKLD = torch.from_numpy(self._values[layer]).index_select(0, blocks)
        # What lies behind the sequence's end may be anything, and is cut off.
        keys_KTD = keys_BKDL.permute(1, 0, 3, 2).flatten(1, 2)[:, : span.end]
        values_KTD = values_BKLD.transpose(0, 1).flatten(1, 2)[:, : span.end]
        mask_TT = span.mask(window, self._dtype)
        outputs_HTD = _attention(queries_THD.transpose(0, 1), keys_KTD, values_KTD, mask_TT, scale, 0)
        return outputs_HTD.transpose(0, 1)

    def _by_token(self, states: torch.Tensor) -> torch.Tensor:
        return states[0].transpose(0, 1).to(self._dtype).contiguous()


class TorchMemory:
    """Blocks on any device, through plain torch operations."""

    def __init__(
        self, shapes: Sequence[LayerShape], num_blocks: int, dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        num_tokens = num_blocks * BLOCK_TOKENS
        self._keys = [
            torch.zeros((num_tokens, s.num_heads, s.key_size), dtype=dtype, device=device)
            for s, device in zip(shapes, devices, strict=True)
        ]
        self._values = [
            torch.zeros((num_tokens, s.num_heads, s.value_size), dtype=dtype, device=device)
            for s, device in zip(shapes, devices, strict=True)
        ]
        self._layout: Layout | None = None
        self._places: dict[torch.device, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def lay_out(self, layout: Layout) -> None:
        self._layout = layout
        self._places = {}

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        layout = self._layout
        assert layout is not None
        written_N, read_ST = self._places_on(keys.device)
        self._keys[layer].index_copy_(0, written_N, keys[0].transpose(0, 1))
        self._values[layer].index_copy_(0, written_N, values[0].transpose(0, 1))
        outputs = []
        for row, read_T in enumerate(read_ST):
            start, end = layout.starts[row], layout.starts[row + 1]
            keys_KTD = self._keys[layer].index_select(0, read_T).transpose(0, 1)
            values_KTD = self._values[layer].index_select(0, read_T).transpose(0, 1)
            allowed = _allowed(end - start, len(read_T), window, keys.device)
            outputs.append(_attention(queries[0, :, start:end], keys_KTD, values_KTD, allowed, scale, softcap))
        return torch.cat(outputs, dim=1).transpose(0, 1)[None]

    def _places_on(self, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Flat places that the step's tokens are written to, and those of each sequence's tokens up to its last."""
        if device not in self._places:
            layout = self._layout
            assert layout is not None
            blocks_N = layout.tables_SB[layout.rows_N, layout.positions_N // BLOCK_TOKENS].astype(np.int64)
            written_N = blocks_N * BLOCK_TOKENS + layout.positions_N % BLOCK_TOKENS
            read_ST = []
            for row, end in enumerate(layout.starts[1:]):
                positions_T = np.arange(int(layout.positions_N[end - 1]) + 1)
                blocks_T = layout.tables_SB[row, positions_T // BLOCK_TOKENS].astype(np.int64)
                places_T = blocks_T * BLOCK_TOKENS + positions_T % BLOCK_TOKENS
                read_ST.append(torch.from_numpy(places_T).to(device))
            self._places[device] = (torch.from_numpy(written_N).to(device), read_ST)
        return self._places[device]


class ShapeProbe:
    """Stands in for a memory during one forward, to learn what each layer keeps, and where."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.devices: dict[int, torch.device] = {}

    def lay_out(self, layout: Layout) -> None:
        return

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: float
    ) -> torch.Tensor:
        shape = LayerShape(num_heads=keys.shape[1], key_size=keys.shape[3], value_size=values.shape[3])
        if layer in self.shapes:
            raise UnsupportedAttention(f"layer {layer} attends twice")
        self.shapes[layer] = shape
        self.devices[layer] = keys.device
        group = queries.shape[1] // keys.shape[1]
        return values.repeat_interleave(group, dim=1).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Seat:
    """What an attention module needs to know: its memory, and its layer there."""

    memory: KVMemory
    layer: int


def seat(model: Any, memory: KVMemory) -> int:
    """Give every attention module of the model its place in ``memory``; how many there are."""
    modules = [
        module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int) and _attends(module)
    ]
    for module in modules:
        setattr(module, _SEAT, _Seat(memory, module.layer_idx))
    return len(modules)


def cpu_item_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model of ``dtype`` keeps its keys and values in on a CPU."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    for name in ("s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise UnsupportedAttention(f"attention with {name}")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("attention that is not causal")
    place: _Seat = getattr(module, _SEAT)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    result = place.memory.attend(
        place.layer, query, key, value, scale=scale, window=sliding_window or 0, softcap=softcap or 0.0
    )
    return result, None


AttentionInterface.register(ATTENTION, _attend_from_blocks)


def _allowed(num_queries: int, num_keys: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Which keys the last ``num_queries`` tokens see, ``[queries, keys]``; None for all."""
    if num_queries == 1 and not 0 < window < num_keys:
        return None
    distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    distance = distance - torch.arange(num_keys, device=device)[None]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _attention(
    queries_HND: torch.Tensor,
    keys_KTD: torch.Tensor,
    values_KTD: torch.Tensor,
    allowed_NT: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Outputs ``[H, N, D]`` of one sequence."""
    if not softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            queries_HND[None], keys_KTD[None], values_KTD[None], allowed_NT, scale=scale, enable_gqa=True
        )[0]
    group = queries_HND.shape[0] // keys_KTD.shape[0]
    keys_HTD, values_HTD = (states.repeat_interleave(group, dim=0) for states in (keys_KTD, values_KTD))
    scores_HNT = softcap * torch.tanh(queries_HND @ keys_HTD.transpose(1, 2) * (scale / softcap))
    if allowed_NT is not None:
        scores_HNT = scores_HNT.masked_fill(~allowed_NT, -torch.inf)
    return scores_HNT.float().softmax(dim=-1).to(values_HTD.dtype) @ values_HTD
