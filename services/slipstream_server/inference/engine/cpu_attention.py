"""Attention on a CPU straight from KV blocks: no gathering, no padding, each sequence at its own length.

Compiled by Numba once per dtype and kept in its cache. Reads K transposed within a block, so that the scores of one
query and a whole block come out of whole vectors. Why so, on two cores in float32: beside dense slots and
scaled_dot_product_attention it is as fast where all sequences are equally long (16 rows of 150: 10 ms against 13 for
30 layers; 48 rows: 25 against 33) and ahead by their padding where they are not; and blocks make prefixes free.

Shapes: N tokens of the step, S sequences, H query heads in groups of G for each of K key heads, D head size (a
multiple of 8), B blocks, L tokens in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS

HEAD_SIZE_MULTIPLE = 8
_L = BLOCK_TOKENS
# All of fast math but the assumption that nothing is infinite or NaN.
_FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}


def _compiled(*, parallel: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile on first use; where the file system has a place for it, once and for all."""

    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        options = {"parallel": parallel, "fastmath": _FASTMATH, "error_model": "numpy"}
        try:
            kernel: Callable[..., None] = njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache can be written to
            kernel = njit(**options)(function)
        return kernel

    return compiled


@intrinsic  # type: ignore[untyped-decorator]
def _float32_of_bits(typing_context: Any, bits: Any) -> Any:
    """Read the 32 bits of an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _exp(x: float) -> float:
    """e to the x, for x at most 0: exact to the last bits in float64, and without a call in float32."""
    raise NotImplementedError("compiled code only")


@overload(_exp, inline="always")  # type: ignore[untyped-decorator]
def _compile_exp(x: Any) -> Any:

    def exp64(x: Any) -> Any:
        return math.exp(x)

    def exp32(x: Any) -> Any:
        # Cephes' expf: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2]; 1 ulp or so.
        x = max(x, np.float32(-87.0))
        k = np.int32(math.floor(x * np.float32(1.44269504) + np.float32(0.5)))
        r = (x - np.float32(k) * np.float32(0.693359375)) + np.float32(k) * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        return p * _float32_of_bits(np.int32((k + np.int32(127)) << np.int32(23)))

    return exp32 if x == types.float32 else exp64


@_compiled(parallel=False)
def _softmax(scores_T: Any, clear_from: int, begin: int, end: int, scale: Any, softcap: Any) -> None:
    """Scores become weights between ``begin`` and ``end``, and 0 from ``clear_from`` to ``begin``."""
    if softcap > 0:
        for j in range(begin, end):
            scores_T[j] = softcap * math.tanh(scores_T[j] * scale / softcap)
        scale = scale / scale
    largest = scores_T[begin]
    for j in range(begin, end):
        largest = max(largest, scores_T[j])
    total = scale * 0
    for j in range(begin, end):
        scores_T[j] = _exp((scores_T[j] - largest) * scale)
        total += scores_T[j]
    for j in range(begin, end):
        scores_T[j] /= total
    for j in range(clear_from, begin):
        scores_T[j] = 0


@_compiled(parallel=True)
def write(
    keys_NKD: Any, values_NKD: Any, rows_N: Any, positions_N: Any, tables_SB: Any, keys_BKDL: Any, values_BKLD: Any
) -> None:
    """Put the keys and values of the step's tokens into their blocks."""
    num_tokens, num_heads, size = keys_NKD.shape
    for n in prange(num_tokens):
        block = tables_SB[rows_N[n], positions_N[n] // _L]
        place = positions_N[n] % _L
        for h in range(num_heads):
            for d in range(size):
                keys_BKDL[block, h, d, place] = keys_NKD[n, h, d]
                values_BKLD[block, h, place, d] = values_NKD[n, h, d]


@_compiled(parallel=True)
def attend(
    queries_NHD: Any,
    tokens_T: Any,
    rows_N: Any,
    positions_N: Any,
    tables_SB: Any,
    keys_BKDL: Any,
    values_BKLD: Any,
    scale: Any,
    window: int,
    softcap: Any,
    lanes: int,
    outputs_NHD: Any,
) -> None:
    """The tokens numbered in ``tokens_T`` attend, each to its own sequence up to itself: to the last ``window`` tokens
    of it, where that is not 0. The outputs of all others stay as they are.

    ``softcap`` 0: none. ``scale`` and ``softcap`` are of the arrays' dtype. ``lanes``: threads to share the work.
    """
    _, num_query_heads, size = queries_NHD.shape
    num_heads = keys_BKDL.shape[1]
    group = num_query_heads // num_heads
    most_blocks = tables_SB.shape[1]
    for lane in prange(lanes):
        weights_GT = np.empty((group, most_blocks * _L), queries_NHD.dtype)
        # Lanes take turns: long and short sequences, and the tokens of a prompt, stand in no order that is fair.
        for item in range(lane, len(tokens_T) * num_heads, lanes):
            n, h = tokens_T[item // num_heads], item % num_heads
            table_B = tables_SB[rows_N[n]]
            end = positions_N[n] + 1
            begin = max(0, end - window) if window > 0 else 0
            first_block, last_block = begin // _L, (end + _L - 1) // _L
            for b in range(first_block, last_block):
                keys_DL = keys_BKDL[table_B[b], h]
                for g in range(group):
                    query_D = queries_NHD[n, h * group + g]
                    scores_L = weights_GT[g, b * _L : b * _L + _L]
                    for j in range(_L):
                        scores_L[j] = 0
                    for d in range(0, size, 8):
                        q0, q1, q2, q3 = query_D[d], query_D[d + 1], query_D[d + 2], query_D[d + 3]
                        q4, q5, q6, q7 = query_D[d + 4], query_D[d + 5], query_D[d + 6], query_D[d + 7]
                        for j in range(_L):
                            scores_L[j] += (
                                (q0 * keys_DL[d, j] + q1 * keys_DL[d + 1, j])
                                + (q2 * keys_DL[d + 2, j] + q3 * keys_DL[d + 3, j])
                            ) + (
                                (q4 * keys_DL[d + 4, j] + q5 * keys_DL[d + 5, j])
                                + (q6 * keys_DL[d + 6, j] + q7 * keys_DL[d + 7, j])
                            )
            for g in range(group):
                _softmax(weights_GT[g], first_block * _L, begin, end, scale, softcap)
                for d in range(size):
                    outputs_NHD[n, h * group + g, d] = 0
            for b in range(first_block, last_block):
                values_LD = values_BKLD[table_B[b], h]
                # What lies behind the sequence's end is not even multiplied by 0: it may be anything.
                num_tokens_here = min(_L, end - b * _L)
                num_by_eights = num_tokens_here - num_tokens_here % 8
                for g in range(group):
                    output_D = outputs_NHD[n, h * group + g]
                    weights_L = weights_GT[g, b * _L : b * _L + _L]
                    for j in range(0, num_by_eights, 8):
                        p0, p1, p2, p3 = weights_L[j], weights_L[j + 1], weights_L[j + 2], weights_L[j + 3]
                        p4, p5, p6, p7 = weights_L[j + 4], weights_L[j + 5], weights_L[j + 6], weights_L[j + 7]
                        for d in range(size):
                            output_D[d] += (
                                (p0 * values_LD[j, d] + p1 * values_LD[j + 1, d])
                                + (p2 * values_LD[j + 2, d] + p3 * values_LD[j + 3, d])
                            ) + (
                                (p4 * values_LD[j + 4, d] + p5 * values_LD[j + 5, d])
                                + (p6 * values_LD[j + 6, d] + p7 * values_LD[j + 7, d])
                            )
                    for j in range(num_by_eights, num_tokens_here):
                        for d in range(size):
                            output_D[d] += weights_L[j] * values_LD[j, d]
