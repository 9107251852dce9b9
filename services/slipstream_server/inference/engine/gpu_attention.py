"""Attention on a GPU straight from KV blocks: Triton kernels that read keys and values through the block table.

    write_blocks   the step's keys and values go to their blocks
    attend_tiles   tiles of successive queries of one sequence: decoding rows (tiles of one), or pieces of prompts
    merge_splits   adds up what several programs found in parts of one long context

A program holds the queries of a tile for one key head with all its query heads: keys and values are read once for the
whole group. Contexts of decoding rows are split over more programs where rows and heads alone would leave the device
idle; every program finds its part from the positions on the device, so that one recorded launch serves every length.
Sums are kept in float32 (float64 for models of that) and products never rounded to TF32.

Needs triton, which comes with CUDA builds of torch: imported by whoever has a GPU, never on a CPU but by tests, under
Triton's interpreter. Launches only, no synchronisation; engine thread. Shapes: N tokens of the step, S sequences,
H query heads in groups of G for each of K key heads, D head size, B blocks, L tokens in a block, T tiles, P splits.
"""

# Kernels are in Triton's language: their parameters have its types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slipstream_server.inference.engine.gpu_tables import StepTables, Tiles
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import AttentionRule

# Launches do not depend on the step's lengths: they can be recorded once and replayed.
IS_RECORDABLE = True

# Keys and values of one read, twice (the next ones are on their way), fit into every GPU's shared memory.
_KEYS_AT_ONCE = 64
_BYTES_AT_ONCE = 32 * 1024
_STAGES = 2
_LEAST_DOT_ROWS = 16
_PROMPT_ROWS = 64
_PROGRAMS_PER_PROCESSOR = 4
_MOST_SPLITS = 16


@triton.jit(do_not_specialize=("tables_s", "tables_b"))  # type: ignore[untyped-decorator]
def write_blocks(
    keys, values, rows, positions, tables, key_blocks, value_blocks,
    keys_n, keys_k, values_n, values_k, tables_s, tables_b,
    num_heads: tl.constexpr, key_size: tl.constexpr, value_size: tl.constexpr, block_tokens: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
) -> None:  # fmt: skip
    """One token and head per program. Heads lie along ``keys_k``; items of a head are successive."""
    n = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(positions + n)
    block = tl.load(tables + tl.load(rows + n) * tables_s + (position // block_tokens) * tables_b).to(tl.int64)
    place = (block * num_heads + head) * block_tokens + position % block_tokens
    d = tl.arange(0, key_width)
    key = tl.load(keys + n * keys_n + head * keys_k + d, mask=d < key_size)
    tl.store(key_blocks + place * key_size + d, key, mask=d < key_size)
    d = tl.arange(0, value_width)
    value = tl.load(values + n * values_n + head * values_k + d, mask=d < value_size)
    tl.store(value_blocks + place * value_size + d, value, mask=d < value_size)


@triton.jit(do_not_specialize=("tables_s", "tables_b", "num_items", "window"))  # type: ignore[untyped-decorator]
def attend_tiles(
    queries, rows, positions, tables, firsts, counts, key_blocks, value_blocks, outputs, largest_out, totals_out,
    queries_n, queries_h, tables_s, tables_b, num_items, scale, softcap, window,
    num_heads: tl.constexpr, group: tl.constexpr, group_width: tl.constexpr, tile: tl.constexpr,
    keys_at_once: tl.constexpr, key_size: tl.constexpr, value_size: tl.constexpr, key_width: tl.constexpr,
    value_width: tl.constexpr, block_tokens: tl.constexpr, num_splits: tl.constexpr, has_softcap: tl.constexpr,
    sums: tl.constexpr,
) -> None:  # fmt: skip
    """Rows of the tile are (token, query head of the group). With one split the output is whole, else a part of it."""
    first = tl.load(firsts + tl.program_id(0))
    count = tl.load(counts + tl.program_id(0))
    head = tl.program_id(1)
    split = tl.program_id(2)

    r = tl.arange(0, tile * group_width)
    token = first + r // group_width
    query_head = head * group + r % group_width
    is_row = (r // group_width < count) & (r % group_width < group)
    position = tl.load(positions + token, mask=is_row, other=0)
    table = tables + tl.load(rows + first) * tables_s

    # The tile's keys: up to its last token, from the first that its first token sees; then this program's part of it.
    end = tl.load(positions + first + count - 1) + 1
    begin = tl.where(window > 0, tl.maximum(0, tl.load(positions + first) + 1 - window), 0)
    begin = begin // keys_at_once * keys_at_once
    share = tl.cdiv(tl.cdiv(end - begin, keys_at_once), num_splits) * keys_at_once
    begin = begin + split * share
    end = tl.minimum(end, begin + share)

    dk = tl.arange(0, key_width)
    dv = tl.arange(0, value_width)
    query = tl.load(
        queries + token[:, None].to(tl.int64) * queries_n + query_head[:, None] * queries_h + dk[None],
        mask=is_row[:, None] & (dk < key_size)[None],
        other=0.0,
    )
    largest = tl.full([tile * group_width], float("-inf"), sums)
    total = tl.zeros([tile * group_width], sums)
    found = tl.zeros([tile * group_width, value_width], sums)

    for start in range(begin, end, keys_at_once):
        j = start + tl.arange(0, keys_at_once)
        # What lies behind the sequence's end is not even multiplied by 0: it may be anything.
        is_key = j < end
        block = tl.load(table + (j // block_tokens) * tables_b, mask=is_key, other=0).to(tl.int64)
        place = (block * num_heads + head) * block_tokens + j % block_tokens
        key = tl.load(
            key_blocks + place[:, None] * key_size + dk[None],
            mask=is_key[:, None] & (dk < key_size)[None],
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(key), input_precision="ieee", out_dtype=sums) * scale
        if has_softcap:
            # tanh by way of exp of what is never positive: it cannot overflow.
            shrunk = tl.exp(-2.0 * tl.abs(scores) / softcap)
            bent = softcap * (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0, -bent, bent)
        sees = is_key[None] & (j[None] <= position[:, None])
        sees = sees & ((window == 0) | (j[None] > position[:, None] - window))
        scores = tl.where(sees, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score; its weights are 0 all the same.
        level = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(scores - level[:, None])
        kept = tl.exp(largest - level)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(
            value_blocks + place[:, None] * value_size + dv[None],
            mask=is_key[:, None] & (dv < value_size)[None],
            other=0.0,
        )
        found = found * kept[:, None]
        found += tl.dot(weights.to(value.dtype), value, input_precision="ieee", out_dtype=sums)
        largest = new_largest

    item = split * num_items + token.to(tl.int64) * (num_heads * group) + query_head
    if num_splits == 1:
        found = found / tl.where(total == 0, 1.0, total)[:, None]
    else:
        tl.store(largest_out + item, largest, mask=is_row)
        tl.store(totals_out + item, total, mask=is_row)
    tl.store(
        outputs + item[:, None] * value_size + dv[None],
        found.to(outputs.dtype.element_ty),
        mask=is_row[:, None] & (dv < value_size)[None],
    )


@triton.jit(do_not_specialize=("num_items",))  # type: ignore[untyped-decorator]
def merge_splits(
    parts, largest_in, totals_in, outputs, num_items,
    value_size: tl.constexpr, value_width: tl.constexpr, num_splits: tl.constexpr,
) -> None:  # fmt: skip
    """One token and query head per program: the parts, each on the scale of its own largest score."""
    item = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, num_splits)
    d = tl.arange(0, value_width)
    largest = tl.load(largest_in + split * num_items + item)
    weights = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(tl.load(totals_in + split * num_items + item) * weights, 0)
    part = tl.load(
        parts + (split * num_items + item)[:, None] * value_size + d[None], mask=(d < value_size)[None], other=0.0
    )
    whole = tl.sum(part * weights[:, None], 0) / total
    tl.store(outputs + item * value_size + d, whole.to(outputs.dtype.element_ty), mask=d < value_size)


def write(
    keys_KND: torch.Tensor,
    values_KND: torch.Tensor,
    tables: StepTables,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
) -> None:
    """Put the keys and values of the step's tokens into their blocks."""
    keys_KND, values_KND = _with_whole_heads(keys_KND), _with_whole_heads(values_KND)
    num_heads, num_tokens, key_size = keys_KND.shape
    value_size = values_KND.shape[2]
    write_blocks[(num_tokens, num_heads)](
        keys_KND, values_KND, tables.rows_N, tables.positions_N, tables.tables_SB, keys_BKLD, values_BKLD,
        keys_KND.stride(1), keys_KND.stride(0), values_KND.stride(1), values_KND.stride(0), *tables.tables_SB.stride(),
        num_heads, key_size, value_size, BLOCK_TOKENS, _columns(key_size), _columns(value_size),
    )  # fmt: skip


def attend(
    queries_HND: torch.Tensor,
    tables: StepTables,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
    rule: AttentionRule,
) -> torch.Tensor:
    """Each token attends to its own sequence up to itself, ``[N, H, D]``; see KVMemory.attend."""
    queries_HND = _with_whole_heads(queries_HND)
    num_query_heads, num_tokens, _ = queries_HND.shape
    outputs_NHD = queries_HND.new_empty((num_tokens, num_query_heads, values_BKLD.shape[3]))
    for tiles in (tables.decoding, tables.prompts):
        if tiles is not None:
            _attend(queries_HND, tables, tiles, keys_BKLD, values_BKLD, rule, outputs_NHD)
    return outputs_NHD


def num_splits(num_tiles: int, num_heads: int, most_tokens: int, device: torch.device) -> int:
    """Into how many parts the contexts of decoding rows are split; a power of two."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return splits_for(num_tiles * num_heads, most_tokens, processors)


def splits_for(num_programs: int, most_tokens: int, num_processors: int) -> int:
    """Parts enough to fill the device, none of which is shorter than a few reads."""
    wanted = num_processors * _PROGRAMS_PER_PROCESSOR // max(1, num_programs)
    useful = most_tokens // (4 * _KEYS_AT_ONCE)
    parts = max(1, min(wanted, useful, _MOST_SPLITS))
    return 1 << (parts.bit_length() - 1)


def _attend(
    queries_HND: torch.Tensor,
    tables: StepTables,
    tiles: Tiles,
    keys_BKLD: torch.Tensor,
    values_BKLD: torch.Tensor,
    rule: AttentionRule,
    outputs_NHD: torch.Tensor,
) -> None:
    num_heads, key_size, value_size = keys_BKLD.shape[1], keys_BKLD.shape[3], values_BKLD.shape[3]
    num_tiles, num_query_heads = len(tiles.firsts_T), queries_HND.shape[0]
    group = num_query_heads // num_heads
    parts = tables.num_splits if tiles is tables.decoding else 1
    sums = torch.float64 if queries_HND.dtype == torch.float64 else torch.float32
    parts_PNHD, largest_PNH, totals_PNH = outputs_NHD[None], outputs_NHD, outputs_NHD
    if parts > 1:
        # Decoding rows are the first of the step, one token each.
        parts_PNHD = outputs_NHD.new_empty((parts, num_tiles, *outputs_NHD.shape[1:]), dtype=sums)
        largest_PNH, totals_PNH = (parts_PNHD.new_empty(parts_PNHD.shape[:3]) for _ in range(2))
    keys_at_once = keys_per_read((_columns(key_size) + _columns(value_size)) * keys_BKLD.element_size())
    group_width = _width(group)
    tile = max(tiles.most, -(-_LEAST_DOT_ROWS // group_width))
    attend_tiles[(num_tiles, num_heads, parts)](
        queries_HND, tables.rows_N, tables.positions_N, tables.tables_SB, tiles.firsts_T, tiles.counts_T,
        keys_BKLD, values_BKLD, parts_PNHD, largest_PNH, totals_PNH,
        queries_HND.stride(1), queries_HND.stride(0), *tables.tables_SB.stride(),
        num_tiles * num_query_heads, rule.scale, rule.softcap, rule.window,
        num_heads, group, group_width, tile, keys_at_once, key_size, value_size,
        _columns(key_size), _columns(value_size), BLOCK_TOKENS, parts, rule.softcap > 0,
        tl.float64 if sums == torch.float64 else tl.float32, num_stages=_STAGES,
    )  # fmt: skip
    if parts > 1:
        merge_splits[(num_tiles * num_query_heads,)](
            parts_PNHD, largest_PNH, totals_PNH, outputs_NHD, num_tiles * num_query_heads,
            value_size, _columns(value_size), parts,
        )  # fmt: skip


def keys_per_read(row_bytes: int) -> int:
    """How many keys and values of so many bytes are read at once, a power of two."""
    fitting = max(_LEAST_DOT_ROWS, min(_KEYS_AT_ONCE, _BYTES_AT_ONCE // row_bytes))
    return 1 << (fitting.bit_length() - 1)


def tile_tokens(group: int) -> int:
    """How many tokens of a prompt one tile holds, a power of two."""
    return max(1, _PROMPT_ROWS // _width(group))


def _with_whole_heads(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(2) == 1 else states.contiguous()


def _width(size: int) -> int:
    """Triton's ranges are powers of two."""
    return int(triton.next_power_of_2(size))


def _columns(size: int) -> int:
    """Its products want at least 16 of them."""
    return max(_LEAST_DOT_ROWS, _width(size))
