"""Where a step's tokens belong, as tensors on a device: what kernels are launched with.

Decoding rows, which bring one token each and stand first, are tiles of their own; the pieces of prompts behind them
are cut into tiles of several tokens. Shapes: N tokens of the step, S sequences, B blocks of each, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slipstream_server.inference.engine.paged_attention import Layout
from slipstream_server.inference.engine.transfers import to_device


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pieces of successive tokens of one sequence each: their first tokens, how many, and the most there may be."""

    firsts_T: torch.Tensor
    counts_T: torch.Tensor
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTables:
    """A step's rows, positions and block tables, int32. ``most_tokens``: no context of a decoding row is longer.

    ``prompt_spans``: row, first token, end and number of keys of every sequence that does not just decode.
    """

    rows_N: torch.Tensor
    positions_N: torch.Tensor
    tables_SB: torch.Tensor
    decoding: Tiles | None
    prompts: Tiles | None
    most_tokens: int
    num_splits: int = 1
    prompt_spans: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def num_decoding(self) -> int:
        return 0 if self.decoding is None else len(self.decoding.firsts_T)


def num_decoding_rows(layout: Layout) -> int:
    """How many rows stand first with one token each."""
    counts = np.diff(layout.starts)
    longer = np.flatnonzero(counts != 1)
    return int(longer[0]) if len(longer) else len(counts)


def tables_on(device: torch.device, layout: Layout, tile_tokens: int, num_splits: int = 1) -> StepTables:
    """The step's tables on ``device``; prompts are cut into tiles of ``tile_tokens``."""
    num_decoding = num_decoding_rows(layout)
    starts = layout.starts
    prompts = [(first, min(tile_tokens, end - first)) for start, end in zip(starts[num_decoding:-1],
               starts[num_decoding + 1 :], strict=True) for first in range(start, end, tile_tokens)]  # fmt: skip
    decoding = np.stack([np.arange(num_decoding), np.ones(num_decoding)])
    return StepTables(
        rows_N=to_device(layout.rows_N, device),
        positions_N=to_device(layout.positions_N, device),
        tables_SB=to_device(layout.tables_SB, device),
        decoding=_tiles(decoding, 1, device) if num_decoding else None,
        prompts=_tiles(np.array(prompts).T, tile_tokens, device) if prompts else None,
        most_tokens=int(layout.positions_N[:num_decoding].max(initial=-1)) + 1,
        num_splits=num_splits,
        prompt_spans=tuple(
            (row, starts[row], starts[row + 1], int(layout.positions_N[starts[row + 1] - 1]) + 1)
            for row in range(num_decoding, len(starts) - 1)
        ),
    )


def _tiles(firsts_and_counts: Any, most: int, device: torch.device) -> Tiles:
    firsts_T, counts_T = to_device(firsts_and_counts.astype(np.int32, order="C"), device)
    return Tiles(firsts_T, counts_T, most)
