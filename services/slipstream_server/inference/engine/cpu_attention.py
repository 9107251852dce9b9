"""Attention on a CPU straight from KV blocks: no gathering, no padding, each sequence at its own length.

Compiled by Numba once per dtype and kept in its cache. The two inner products are written in vectors of LLVM, so that
the sums of up to four query heads, which share one reading of a block, stay in registers: what Numba makes of loops
stores them again and again and takes 1.3 to 1.8 times as long. K is transposed within a block, so that the scores of
one query and a whole block come out of whole vectors. Keys and values are read once per step, and blocks lie anywhere,
so that the processor does not foresee them. They are asked for ahead: a block's values while its keys are multiplied,
the keys of what comes next while values are (1.3 to 1.4 times as fast).

Why blocks, and read in place (tests/bench/kv_layout on two cores with AVX-512, 16 and 48 rows of SmolLM2's shape):
where lengths are mixed, 16 to 1,024 tokens, blocks are 1.6 times as fast in float32 and 2.4 in bfloat16 as slots padded
to the longest at their best, torch's scaled_dot_product_attention with query heads grouped. They hold 3% more than the
tokens take, slots 84 to 88%. Where all rows are equally long, they are 0.9 to 1.6 and 1.4 to 1.5 times as fast. Left to
enable_gqa, slots take another 4 to 6 times as long in bfloat16; concatenating at every token takes 1.7 to 8 times as
long as blocks in float32, gathering them into a rectangle 5 to 26 times. Prefixes that are shared come on top. One row
alone gains nothing by blocks (0.9 to 1.1). The memory's limit is far: 48 rows of 1,024 tokens are read at 8.5 GB/s in
float32 and 4.5 in bfloat16, where the two cores read 33, so that bfloat16 takes as long as float32 there.

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
from numba.core import cgutils
from numba.extending import intrinsic, overload

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS

_L = BLOCK_TOKENS
# Vectors of so many items, whatever the processor has: one of its own, or two.
_LANES = 8
_CACHE_LINE_BYTES = 64
# All of fast math but the assumption that nothing is infinite or NaN.
_FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}


def compiled(*, parallel: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
def float32_of_bits(typing_context: Any, bits: Any) -> Any:
    """Read the 32 bits of an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float32(typing_context: Any, number: Any) -> Any:
    """Read the 32 bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


def exp(x: float) -> float:
    """e to the x, for x at most 0: exact to the last bits in float64, and without a call in float32."""
    raise NotImplementedError("compiled code only")


@overload(exp, inline="always")  # type: ignore[untyped-decorator]
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
        return p * float32_of_bits(np.int32((k + np.int32(127)) << np.int32(23)))

    return exp32 if x == types.float32 else exp64


class _Flat:
    """A contiguous array argument of an intrinsic, as vectors and scalars in memory. bfloat16 is read as float32."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        self._builder = builder
        self._data = context.make_array(kind)(context, builder, value).data
        self._is_bfloat16 = kind.dtype == types.uint16
        self._vector = ir.VectorType(self._data.type.pointee, _LANES)
        self._align = kind.dtype.bitwidth // 8

    def load(self, offset: Any, number: int) -> Any:
        vector = self._builder.load(self._place(offset, number), align=self._align)
        if not self._is_bfloat16:
            return vector
        bits = ir.VectorType(ir.IntType(32), _LANES)
        upper = self._builder.shl(self._builder.zext(vector, bits), ir.Constant(bits, [16] * _LANES))
        return self._builder.bitcast(upper, ir.VectorType(ir.FloatType(), _LANES))

    def store(self, vector: Any, offset: Any, number: int) -> None:
        self._builder.store(vector, self._place(offset, number), align=self._align)

    def fetch(self, offset: Any, number: int) -> None:
        """Bring so many items from ``offset`` on into the core's cache, without waiting for them."""
        builder = self._builder
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        for first in range(0, number, _CACHE_LINE_BYTES // self._align):
            item = builder.gep(self._data, [_plus(builder, offset, first)])
            to_read, into_second_level, of_data = ir.Constant(flag, 0), ir.Constant(flag, 2), ir.Constant(flag, 1)
            builder.call(prefetch, [builder.bitcast(item, pointer), to_read, into_second_level, of_data])

    def zeros(self) -> Any:
        return ir.Constant(self._vector, None)

    def splat(self, offset: Any) -> Any:
        """One item in all places of a vector."""
        item = self._builder.load(self._builder.gep(self._data, [offset]))
        undefined = ir.Constant(self._vector, ir.Undefined)
        first = self._builder.insert_element(undefined, item, ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), None)
        return self._builder.shuffle_vector(first, undefined, mask)

    def _place(self, offset: Any, number: int) -> Any:
        item = self._builder.gep(self._data, [_plus(self._builder, offset, number * _LANES)])
        return self._builder.bitcast(item, self._vector.as_pointer())


def _plus(builder: Any, offset: Any, number: int) -> Any:
    return builder.add(offset, ir.Constant(offset.type, number)) if number else offset


def _scores_of(num_rows: int) -> Any:
    """A function that fills the scores of so many query heads and one block, held in registers until all is summed."""

    @intrinsic  # type: ignore[untyped-decorator]
    def scores(
        typing_context: Any,
        queries: Any,
        query_at: Any,
        keys: Any,
        key_at: Any,
        scores: Any,
        score_at: Any,
        score_stride: Any,
        size: Any,
        ahead: Any,
        ahead_at: Any,
    ) -> Any:
        """``scores[r, j] = sum over d of queries[r, d] * keys[d, j]``; fetches a block of what is ahead meanwhile."""

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kinds = signature.args
            queries, keys, scores, ahead = (_Flat(context, builder, kinds[i], values[i]) for i in (0, 2, 4, 8))
            _, query_at, _, key_at, _, score_at, stride, size, _, ahead_at = values
            num_vectors = _L // _LANES
            sums = _sums(builder, scores, num_rows * num_vectors)
            with cgutils.for_range(builder, size) as loop:
                key = builder.add(key_at, builder.mul(loop.index, ir.Constant(size.type, _L)))
                ahead.fetch(builder.add(ahead_at, builder.mul(loop.index, ir.Constant(size.type, _L))), _L)
                columns = [keys.load(key, v) for v in range(num_vectors)]
                for r in range(num_rows):
                    row = builder.add(query_at, builder.mul(size, ir.Constant(size.type, r)))
                    factor = queries.splat(builder.add(row, loop.index))
                    for v, column in enumerate(columns):
                        _add_product(builder, sums[r * num_vectors + v], factor, column)
            for r in range(num_rows):
                row = builder.add(score_at, builder.mul(stride, ir.Constant(size.type, r)))
                for v in range(num_vectors):
                    scores.store(builder.load(sums[r * num_vectors + v]), row, v)
            return context.get_dummy_value()

        at = types.intp
        return types.void(queries, at, keys, at, scores, at, at, at, ahead, at), generate

    return scores


def _mix_of(num_rows: int, num_vectors: int) -> Any:
    """A function that adds so many columns of a block's values to the outputs of so many query heads."""

    @intrinsic  # type: ignore[untyped-decorator]
    def mix(
        typing_context: Any,
        weights: Any,
        weight_at: Any,
        weight_stride: Any,
        values: Any,
        value_at: Any,
        num_tokens: Any,
        outputs: Any,
        output_at: Any,
        size: Any,
        ahead: Any,
        ahead_at: Any,
    ) -> Any:
        """``outputs[r, c] += sum over j of weights[r, j] * values[j, c]``; fetches as much of what is ahead."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            weights, values, outputs, ahead = (_Flat(context, builder, kinds[i], arguments[i]) for i in (0, 3, 6, 9))
            _, weight_at, stride, _, value_at, num_tokens, _, output_at, size, _, ahead_at = arguments
            rows = [builder.add(output_at, builder.mul(size, ir.Constant(size.type, r))) for r in range(num_rows)]
            sums = _sums(builder, outputs, num_rows * num_vectors)
            for r, row in enumerate(rows):
                for v in range(num_vectors):
                    builder.store(outputs.load(row, v), sums[r * num_vectors + v])
            with cgutils.for_range(builder, num_tokens) as loop:
                value = builder.add(value_at, builder.mul(loop.index, size))
                ahead.fetch(builder.add(ahead_at, builder.mul(loop.index, size)), num_vectors * _LANES)
                columns = [values.load(value, v) for v in range(num_vectors)]
                for r in range(num_rows):
                    weight = builder.add(weight_at, builder.mul(stride, ir.Constant(size.type, r)))
                    factor = weights.splat(builder.add(weight, loop.index))
                    for v, column in enumerate(columns):
                        _add_product(builder, sums[r * num_vectors + v], factor, column)
            for r, row in enumerate(rows):
                for v in range(num_vectors):
                    outputs.store(builder.load(sums[r * num_vectors + v]), row, v)
            return context.get_dummy_value()

        at = types.intp
        return types.void(weights, at, at, values, at, at, outputs, at, at, ahead, at), generate

    return mix


def _sums(builder: Any, array: _Flat, count: int) -> list[Any]:
    """Places for vectors like the array's, zero each time the code comes by."""
    places = [cgutils.alloca_once_value(builder, array.zeros()) for _ in range(count)]
    for place in places:
        builder.store(array.zeros(), place)
    return places


def _add_product(builder: Any, place: Any, factor: Any, column: Any) -> None:
    """Add to a sum that stays in a register."""
    flags = ("contract",)
    builder.store(builder.fadd(builder.load(place), builder.fmul(factor, column, flags), flags), place)


_scores_1, _scores_2, _scores_3, _scores_4 = (_scores_of(rows) for rows in (1, 2, 3, 4))
_mix_1x1, _mix_2x1, _mix_3x1, _mix_4x1 = (_mix_of(rows, 1) for rows in (1, 2, 3, 4))
_mix_1x4, _mix_2x4, _mix_3x4, _mix_4x4 = (_mix_of(rows, 4) for rows in (1, 2, 3, 4))


@compiled(parallel=False)
def _score(
    num_rows: int,
    queries: Any,
    query_at: int,
    keys: Any,
    key_at: int,
    scores: Any,
    at: int,
    stride: int,
    size: int,
    ahead: Any,
    ahead_at: int,
) -> None:
    """The scores of 1 to 4 query heads and one block."""
    if num_rows == 4:
        _scores_4(queries, query_at, keys, key_at, scores, at, stride, size, ahead, ahead_at)
    elif num_rows == 3:
        _scores_3(queries, query_at, keys, key_at, scores, at, stride, size, ahead, ahead_at)
    elif num_rows == 2:
        _scores_2(queries, query_at, keys, key_at, scores, at, stride, size, ahead, ahead_at)
    else:
        _scores_1(queries, query_at, keys, key_at, scores, at, stride, size, ahead, ahead_at)


@compiled(parallel=False)
def _mix(
    num_rows: int,
    weights: Any,
    weight_at: int,
    stride: int,
    values: Any,
    value_at: int,
    num_tokens: int,
    outputs: Any,
    at: int,
    size: int,
    ahead: Any,
    ahead_at: int,
) -> None:
    """Add the weighted values of one block to the outputs of 1 to 4 query heads."""
    wide = size - size % (4 * _LANES)
    for c in range(0, wide, 4 * _LANES):
        if num_rows == 4:
            _mix_4x4(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
        elif num_rows == 3:
            _mix_3x4(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
        elif num_rows == 2:
            _mix_2x4(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
        else:
            _mix_1x4(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
    for c in range(wide, size, _LANES):
        if num_rows == 4:
            _mix_4x1(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
        elif num_rows == 3:
            _mix_3x1(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
        elif num_rows == 2:
            _mix_2x1(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )
        else:
            _mix_1x1(
                weights, weight_at, stride, values, value_at + c, num_tokens, outputs, at + c, size, ahead, ahead_at + c
            )


@compiled(parallel=False)
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
        scores_T[j] = exp((scores_T[j] - largest) * scale)
        total += scores_T[j]
    for j in range(begin, end):
        scores_T[j] /= total
    for j in range(clear_from, begin):
        scores_T[j] = 0


@compiled(parallel=True)
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


@compiled(parallel=True)
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

    ``softcap`` 0: none. ``scale`` and ``softcap`` are of the queries' dtype, keys and
    values too, or bfloat16 as uint16. ``lanes``: threads to share the work.
    """
    _, num_query_heads, size = queries_NHD.shape
    num_heads = keys_BKDL.shape[1]
    group = num_query_heads // num_heads
    num_places = tables_SB.shape[1] * _L
    queries, keys = queries_NHD.reshape(-1), keys_BKDL.reshape(-1)
    values, outputs = values_BKLD.reshape(-1), outputs_NHD.reshape(-1)
    for lane in prange(lanes):
        weights_GT = np.empty((group, num_places), queries_NHD.dtype)
        weights = weights_GT.reshape(-1)
        # Head by head, so that tokens of one sequence, and sequences that share a prefix, find its blocks in the cache.
        # Lanes take turns: long and short sequences stand in no order that is fair.
        for item in range(lane, len(tokens_T) * num_heads, lanes):
            n, h = tokens_T[item % len(tokens_T)], item // len(tokens_T)
            table_B = tables_SB[rows_N[n]]
            end = positions_N[n] + 1
            begin = max(0, end - window) if window > 0 else 0
            first_block, last_block = begin // _L, (end + _L - 1) // _L
            first_head = n * num_query_heads + h * group
            next_item = min(item + lanes, len(tokens_T) * num_heads - 1)
            next_n, next_h = tokens_T[next_item % len(tokens_T)], next_item // len(tokens_T)
            next_B, next_blocks = tables_SB[rows_N[next_n]], positions_N[next_n] // _L + 1
            for b in range(first_block, last_block):
                key_at = (table_B[b] * num_heads + h) * size * _L
                for g in range(0, group, 4):
                    at = g * num_places + b * _L
                    query_at = (first_head + g) * size
                    _score(
                        min(4, group - g),
                        queries,
                        query_at,
                        keys,
                        key_at,
                        weights,
                        at,
                        num_places,
                        size,
                        values,
                        key_at,
                    )
            for g in range(group):
                _softmax(weights_GT[g], first_block * _L, begin, end, scale, softcap)
                for d in range(size):
                    outputs_NHD[n, h * group + g, d] = 0
            for b in range(first_block, last_block):
                value_at = (table_B[b] * num_heads + h) * size * _L
                # What lies behind the sequence's end is not even multiplied by 0: it may be anything.
                num_here = min(_L, end - b * _L)
                for g in range(0, group, 4):
                    at = g * num_places + b * _L
                    output_at = (first_head + g) * size
                    _mix(
                        min(4, group - g),
                        weights,
                        at,
                        num_places,
                        values,
                        value_at,
                        num_here,
                        outputs,
                        output_at,
                        size,
                        keys,
                        (next_B[min(b, next_blocks - 1)] * num_heads + next_h) * size * _L,
                    )
