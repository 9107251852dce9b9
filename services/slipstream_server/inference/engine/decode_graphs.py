"""Decoding steps recorded once as CUDA graphs and replayed: one launch in place of a thousand small ones.

A step in which every row brings one token, and none an adapter, finds a recording for so many rows or a few more; the
rest are padding, whose keys and values go to a block that belongs to nobody. All inputs are one buffer on the device,
filled by one copy: token ids, positions, and the block tables, a column for each row.

    buffer_CR   token   token   token   0
                place   place   place   0
                block   block   block   spare
                block   block   ...     (what lies behind a row's last block is never read)

Knows neither model nor CUDA but through ``forward`` and ``record``: tests replay by calling the model again. Engine
thread, under inference_mode. Shapes: R rows, V vocabulary, B blocks of a table, C = B + 2.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from typing import Any

import torch

from slipstream_server.inference.engine.gpu_memory import GpuMemory
from slipstream_server.inference.engine.gpu_tables import StepTables, Tiles
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import Layout

logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids and positions ``[1, R]`` to logits ``[R, V]``."""
Step = Callable[[], torch.Tensor]
Record = Callable[[Step], Step]
"""A step to the same on what its inputs hold then; the result is overwritten by the next replay of any recording."""

_FIRST_TABLE = 2
_SMALL = (1, 2, 4, 8, 16)
_TOLERANCE = 0.05


class RecordingFailed(Exception):
    """A replay does not answer what the step itself does."""


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Row counts to record: close together where padding would cost most, and ``max_rows`` itself."""
    sizes = [size for size in _SMALL if size < max_rows]
    size = _SMALL[-1]
    while (step := size // 2) and size < max_rows:
        sizes += [wider for wider in (size + step, 2 * size) if wider < max_rows]
        size *= 2
    return (*sizes, max_rows)


class DecodeGraphs:
    """The recordings of one model over one memory. ``table_blocks``: no sequence has more."""

    def __init__(self, forward: Forward, memory: GpuMemory, *, max_rows: int, table_blocks: int) -> None:
        device = memory.device
        if device is None:
            raise ValueError("a recording needs a model on one device")
        self._forward = forward
        self._memory = memory
        self._device = device
        self._table_blocks = table_blocks
        self._sizes = bucket_sizes(max_rows)
        self._buffer_CR = torch.zeros((_FIRST_TABLE + table_blocks, max_rows), dtype=torch.int32, device=device)
        self._buffer_CR[_FIRST_TABLE:] = memory.spare_block
        self._rows_R = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._ones_R = torch.ones_like(self._rows_R)
        self._replays: dict[int, Step] = {}

    def record(self, record: Record, report: Callable[[float], None]) -> None:
        """Record every size, the largest first: the smaller ones then fit into its memory. ``report`` gets the part
        that is done. Raises RecordingFailed.
        """
        for number, size in enumerate(reversed(self._sizes), start=1):
            step = self._step(size)
            replay = record(step)
            expected_RV = step().clone()
            difference = (replay() - expected_RV).abs().max() / (expected_RV.abs().max() + 1e-6)
            if not float(difference) <= _TOLERANCE:
                raise RecordingFailed(f"the recording of {size} rows differs by {float(difference):.2g}")
            self._replays[size] = replay
            report(number / len(self._sizes))

    def fits(self, layout: Layout) -> bool:
        """Whether there is a recording for this step, whose rows bring one token each."""
        num_rows, num_blocks = layout.tables_SB.shape
        return bool(num_rows <= self._sizes[-1] and num_blocks <= self._table_blocks)

    def run(self, ids_R: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Logits ``[rows, V]`` of a step that ``fits``, its token ids on the host or on the device; overwritten by
        the next.
        """
        num_rows, num_blocks = layout.tables_SB.shape
        size = self._sizes[bisect.bisect_left(self._sizes, num_rows)]
        # Columns up to the widest table; fresh pinned memory each time, since the copy may still be under way.
        shape = (_FIRST_TABLE + num_blocks, self._buffer_CR.shape[1])
        host_CR = torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._fill(host_CR.numpy(), num_rows, layout)
        is_on_host = ids_R.device.type == "cpu"
        if is_on_host:
            host_CR[0, :num_rows] = ids_R
        self._buffer_CR[: shape[0]].copy_(host_CR, non_blocking=True)
        if not is_on_host:
            self._buffer_CR[0, :num_rows] = ids_R
        return self._replays[size]()[:num_rows]

    def _fill(self, buffer_CR: Any, num_rows: int, layout: Layout) -> None:
        buffer_CR[:_FIRST_TABLE, num_rows:] = 0
        buffer_CR[_FIRST_TABLE:, num_rows:] = self._memory.spare_block
        buffer_CR[1, :num_rows] = layout.positions_N
        buffer_CR[_FIRST_TABLE:, :num_rows] = layout.tables_SB.T

    def _step(self, size: int) -> Step:
        most_tokens = self._table_blocks * BLOCK_TOKENS
        tables = StepTables(
            rows_N=self._rows_R[:size],
            positions_N=self._buffer_CR[1, :size],
            tables_SB=self._buffer_CR[_FIRST_TABLE:, :size].T,
            decoding=Tiles(self._rows_R[:size], self._ones_R[:size], 1),
            prompts=None,
            most_tokens=most_tokens,
            num_splits=self._memory.num_splits(size, most_tokens, self._device),
        )

        def run() -> torch.Tensor:
            self._memory.lay_out_tables(tables)
            return self._forward(self._buffer_CR[0, :size].long()[None], self._buffer_CR[1, :size].long()[None])

        return run


class CudaRecorder:
    """Records steps on one device into memory that all its recordings share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        with torch.cuda.device(self._device):
            self._warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only this one's doings are recorded.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_RV = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits_RV

        return replay

    def _warm_up(self, step: Step) -> None:
        """Compile and allocate what a step needs, beside the stream that records."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
