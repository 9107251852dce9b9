"""Small operations of decoders, each in one pass over memory, where torch takes four to nine: compiled by Numba.

Items are float32, or bfloat16 seen as uint16; sums are in float32. Shapes: N tokens, W width of a token's state, H
heads, D head size. Arrays that are said to be flat are the memory from an item on; how far rows and heads are apart in
it is said beside them. Any thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from slipstream_server.inference.engine.cpu_attention import bits_of_float32, compiled, exp, float32_of_bits


def number_of(item: Any) -> float:
    """An item as a float32."""
    raise NotImplementedError("compiled code only")


@overload(number_of, inline="always")  # type: ignore[untyped-decorator]
def _compile_number_of(item: Any) -> Any:

    def of_bits(item: Any) -> Any:
        return float32_of_bits(np.int32(np.int32(item) << np.int32(16)))

    def of_number(item: Any) -> Any:
        return item

    return of_bits if item == types.uint16 else of_number


def item_like(number: Any, item: Any) -> Any:
    """A float32 as an item of that kind, rounded to nearest, ties to even."""
    raise NotImplementedError("compiled code only")


@overload(item_like, inline="always")  # type: ignore[untyped-decorator]
def _compile_item_like(number: Any, item: Any) -> Any:

    def as_bits(number: Any, item: Any) -> Any:
        bits = bits_of_float32(number)
        if number != number:
            return np.uint16(0x7FC0)
        return np.uint16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

    def as_number(number: Any, item: Any) -> Any:
        return number

    return as_bits if item == types.uint16 else as_number


@compiled(parallel=True)
def norm(states_NW: Any, weight_W: Any, eps: Any, offset: Any, outputs_NW: Any) -> None:
    """Each row over its root mean square, times ``offset + weight``."""
    num_tokens, width = states_NW.shape
    for n in prange(num_tokens):
        state_W, output_W = states_NW[n], outputs_NW[n]
        total = np.float32(0)
        for w in range(width):
            number = number_of(state_W[w])
            total += number * number
        factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for w in range(width):
            number = number_of(state_W[w]) * factor * (offset + number_of(weight_W[w]))
            output_W[w] = item_like(number, state_W[w])


@compiled(parallel=True)
def add_norm(
    states_NW: Any, added_NW: Any, weight_W: Any, eps: Any, offset: Any, sums_NW: Any, outputs_NW: Any
) -> None:
    """``sums = states + added``, and the norm of the sums."""
    num_tokens, width = states_NW.shape
    for n in prange(num_tokens):
        state_W, added_W, sum_W, output_W = states_NW[n], added_NW[n], sums_NW[n], outputs_NW[n]
        total = np.float32(0)
        for w in range(width):
            item = item_like(number_of(state_W[w]) + number_of(added_W[w]), state_W[w])
            sum_W[w] = item
            total += number_of(item) * number_of(item)
        factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for w in range(width):
            number = number_of(sum_W[w]) * factor * (offset + number_of(weight_W[w]))
            output_W[w] = item_like(number, state_W[w])


@compiled(parallel=True)
def rotate_and_write(
    projected_NP: Any,
    cos_ND: Any,
    sin_ND: Any,
    rows_N: Any,
    positions_N: Any,
    tables_SB: Any,
    keys_BKDL: Any,
    values_BKLD: Any,
    rotated_NHD: Any,
) -> None:
    """Rotary positions for queries, in float32, and keys, which go to their blocks with the values: of each token the
    queries of all heads stand first, then the keys, then the values.
    """
    num_tokens, num_query_heads, size = rotated_NHD.shape
    num_heads, length = values_BKLD.shape[1:3]
    first_key = num_query_heads * size
    first_value = first_key + num_heads * size
    half = size // 2
    for n in prange(num_tokens):
        projected_P, cos_D, sin_D = projected_NP[n], cos_ND[n], sin_ND[n]
        block, place = tables_SB[rows_N[n], positions_N[n] // length], positions_N[n] % length
        for h in range(num_query_heads):
            query_D, rotated_D = projected_P[h * size : (h + 1) * size], rotated_NHD[n, h]
            for d in range(half):
                first, second = number_of(query_D[d]), number_of(query_D[d + half])
                rotated_D[d] = first * number_of(cos_D[d]) - second * number_of(sin_D[d])
                rotated_D[d + half] = second * number_of(cos_D[d + half]) + first * number_of(sin_D[d + half])
        for h in range(num_heads):
            begin = first_key + h * size
            key_D, key_DL = projected_P[begin : begin + size], keys_BKDL[block, h]
            for d in range(half):
                first, second = number_of(key_D[d]), number_of(key_D[d + half])
                lower = first * number_of(cos_D[d]) - second * number_of(sin_D[d])
                upper = second * number_of(cos_D[d + half]) + first * number_of(sin_D[d + half])
                key_DL[d, place] = item_like(lower, key_D[d])
                key_DL[d + half, place] = item_like(upper, key_D[d])
            begin = first_value + h * size
            for d in range(size):
                values_BKLD[block, h, place, d] = projected_P[begin + d]


@compiled(parallel=True)
def rotate(states: Any, row_stride: int, head_stride: int, cos_ND: Any, sin_ND: Any, outputs_NHD: Any) -> None:
    """Rotary positions for flat states: the first half of each head is paired with the second."""
    num_tokens, num_heads, size = outputs_NHD.shape
    half = size // 2
    for n in prange(num_tokens):
        cos_D, sin_D = cos_ND[n], sin_ND[n]
        for h in range(num_heads):
            begin = n * row_stride + h * head_stride
            state_D, output_D = states[begin : begin + size], outputs_NHD[n, h]
            for d in range(half):
                first, second = number_of(state_D[d]), number_of(state_D[d + half])
                cos, sin = number_of(cos_D[d]), number_of(sin_D[d])
                output_D[d] = item_like(first * cos - second * sin, state_D[d])
            for d in range(half):
                first, second = number_of(state_D[d]), number_of(state_D[d + half])
                cos, sin = number_of(cos_D[d + half]), number_of(sin_D[d + half])
                output_D[d + half] = item_like(second * cos + first * sin, state_D[d])


@compiled(parallel=True)
def silu_times(gates: Any, gate_stride: int, ups: Any, up_stride: int, outputs_NW: Any) -> None:
    """silu(gate) * up of flat gates and ups."""
    num_tokens, width = outputs_NW.shape
    for n in prange(num_tokens):
        gate_W = gates[n * gate_stride : n * gate_stride + width]
        up_W = ups[n * up_stride : n * up_stride + width]
        output_W = outputs_NW[n]
        for w in range(width):
            gate, up = number_of(gate_W[w]), number_of(up_W[w])
            decay = exp(-abs(gate))
            share = (np.float32(1) if gate >= 0 else decay) / (np.float32(1) + decay)
            output_W[w] = item_like(gate * share * up, gate_W[w])
