"""The kernels that read blocks, and the tiles for prompts, against attention written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import AttentionRule, CpuMemory, LayerShape, Layout

# Sequences by what they held before the step and what it brings: decoding, short and long parts of prompts.
SEQUENCES = [(0, 5), (31, 1), (70, 2), (200, 1), (64, 1), (0, 40), (50, 33), (300, 20), (0, 270)]
TABLE_BLOCKS = 10
# Query heads, key heads, head size: all widths of groups and of vectors that the kernels tell apart.
SHAPES = [(9, 3, 64), (4, 4, 8), (5, 1, 40), (12, 2, 96), (2, 1, 32)]


def written_out(
    query_HD: Any, keys_TKD: Any, values_TKD: Any, scale: float, window: int, softcap: float
) -> np.ndarray[Any, Any]:
    """What one query, the last of its sequence, sees."""
    group = len(query_HD) // keys_TKD.shape[1]
    outputs = []
    for h, query_D in enumerate(query_HD):
        scores_T = keys_TKD[:, h // group] @ query_D * scale
        if softcap:
            scores_T = softcap * np.tanh(scores_T / softcap)
        if window:
            scores_T[: max(0, len(scores_T) - window)] = -np.inf
        weights_T = np.exp(scores_T - scores_T.max())
        outputs.append(weights_T / weights_T.sum() @ values_TKD[:, h // group])
    return np.stack(outputs)


def rounded(numbers: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """The numbers that are there in ``dtype``."""
    return torch.from_numpy(numbers).to(dtype).double().numpy()


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 0.0), (0, 5.0), (9, 3.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.02)], ids=str
)
def test_attention_from_blocks(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int], window: int, softcap: float
) -> None:
    num_query_heads, num_heads, size = shape
    random = np.random.default_rng(7)
    num_blocks = len(SEQUENCES) * TABLE_BLOCKS
    tables = random.permutation(num_blocks).astype(np.int32).reshape(-1, TABLE_BLOCKS)
    memory = CpuMemory([LayerShape(num_heads=num_heads, key_size=size, value_size=size)], num_blocks, dtype)
    states = [rounded(random.standard_normal((2, start + count, num_heads, size)), dtype) for start, count in SEQUENCES]

    def run(spans: list[tuple[int, int]], queries_NHD: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        counts = [count for _, count in spans]
        memory.lay_out(
            Layout(
                rows_N=np.repeat(np.arange(len(spans), dtype=np.int32), counts),
                positions_N=np.concatenate([np.arange(s, s + c) for s, c in spans]).astype(np.int32),
                tables_SB=tables,
                starts=(0, *np.cumsum(counts).tolist()),
            )
        )
        keys, values = (
            np.concatenate([both[i, s : s + c] for both, (s, c) in zip(states, spans, strict=True)]) for i in (0, 1)
        )
        given = [torch.from_numpy(a).to(dtype).transpose(0, 1)[None] for a in (queries_NHD, keys, values)]
        found = memory.attend(0, *given, AttentionRule(scale=size**-0.5, window=window, softcap=softcap))
        return found[0].double().numpy()

    before = [(0, start) for start, _ in SEQUENCES]
    run(before, np.zeros((sum(start for start, _ in SEQUENCES), num_query_heads, size)))
    nan = 0x7FC0 if dtype == torch.bfloat16 else np.nan
    # What lies behind a sequence's end is nobody's, and may be anything.
    for row, (start, count) in enumerate(SEQUENCES):
        block, place = tables[row, (start + count - 1) // BLOCK_TOKENS], (start + count - 1) % BLOCK_TOKENS
        memory._keys[0][block, :, :, place + 1 :] = nan
        memory._values[0][block, :, place + 1 :] = nan
    queries = rounded(random.standard_normal((sum(count for _, count in SEQUENCES), num_query_heads, size)), dtype)
    found = run(SEQUENCES, queries)
    expected = [
        written_out(queries[n], both[0, : start + i + 1], both[1, : start + i + 1], size**-0.5, window, softcap)
        for n, (both, start, i) in enumerate(
            (both, start, i) for both, (start, count) in zip(states, SEQUENCES, strict=True) for i in range(count)
        )
    ]
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=tolerance)
