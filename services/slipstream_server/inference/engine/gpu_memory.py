"""KV memory on GPUs, and where a CPU's kernels do not fit: blocks ``[B, K, L, D]`` in the model's dtype.

``new_gpu_memory`` takes the Triton kernels where they work (triton comes with CUDA builds of torch, and wants a C
compiler), else plain torch (gathered_attention). A step's tables go to each device that has a layer, once a step,
without waiting. Recorded steps (decode_graphs) bring tables of their own. Engine thread. Shapes: as in paged_attention.

Blocks are laid out as on a CPU, where they were measured against other layouts (cpu_attention), but for keys that are
not transposed: a program loads a tile of them either way. That is an expectation, as everything about speed is here:
neither these kernels nor gathered copies have been measured on a GPU. ``python -m tests.bench.kv_layout --device cuda``
is to do it. On a CPU gathering takes 4 to 30 times as long as reading in place, so that it is the last resort.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.gpu_tables import StepTables, num_decoding_rows, tables_on
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import AttentionRule, LayerShape, Layout

logger = logging.getLogger(__name__)


class GpuMemory:
    """Blocks on one or several GPUs, and one more that belongs to nobody: ``spare_block``, where the padding of a
    recorded step writes. ``kernels``: gpu_attention or gathered_attention.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
        kernels: ModuleType,
    ) -> None:
        self.num_blocks = num_blocks
        self.spare_block = num_blocks
        self._kernels = kernels
        self._devices = list(dict.fromkeys(devices))
        self._num_heads = shapes[0].num_heads

        def blocks(shape: LayerShape, size: int, device: torch.device) -> torch.Tensor:
            # Zeros: what a masked product reads must be a number.
            return torch.zeros((num_blocks + 1, shape.num_heads, BLOCK_TOKENS, size), dtype=dtype, device=device)

        placed = list(zip(shapes, devices, strict=True))
        self._keys = [blocks(shape, shape.key_size, device) for shape, device in placed]
        self._values = [blocks(shape, shape.value_size, device) for shape, device in placed]
        self._layout: Layout | None = None
        self._tables: dict[torch.device, StepTables] = {}

    @property
    def device(self) -> torch.device | None:
        """Where all layers are; None for several devices."""
        return self._devices[0] if len(self._devices) == 1 else None

    @property
    def is_recordable(self) -> bool:
        """Whether the kernels' launches do not depend on a step's lengths."""
        return bool(self._kernels.IS_RECORDABLE)

    def lay_out(self, layout: Layout) -> None:
        self._layout = layout
        self._tables = {}

    def lay_out_tables(self, tables: StepTables) -> None:
        """The step that comes has its tables on the one device already."""
        self._layout = None
        self._tables = {self._devices[0]: tables}

    def num_splits(self, num_rows: int, most_tokens: int, device: torch.device) -> int:
        """Into how many parts the contexts of so many decoding rows are split."""
        return int(self._kernels.num_splits(num_rows, self._num_heads, most_tokens, device))

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:
        blocks = (self._keys[layer], self._values[layer])
        tables = self._tables_on(blocks[0].device, queries.shape[1] // keys.shape[1])
        with _current(blocks[0].device):
            self._kernels.write(keys[0], values[0], tables, *blocks)
            outputs_NHD: torch.Tensor = self._kernels.attend(queries[0], tables, *blocks, rule)
        return outputs_NHD[None]

    def _tables_on(self, device: torch.device, group: int) -> StepTables:
        if device not in self._tables:
            layout = self._layout
            assert layout is not None
            num_rows = num_decoding_rows(layout)
            most_tokens = int(layout.positions_N[:num_rows].max(initial=-1)) + 1
            self._tables[device] = tables_on(
                device, layout, self._kernels.tile_tokens(group), self.num_splits(num_rows, most_tokens, device)
            )
        return self._tables[device]


def new_gpu_memory(
    shapes: Sequence[LayerShape], num_blocks: int, dtype: torch.dtype, devices: Sequence[torch.device]
) -> GpuMemory:
    """With the best kernels that work here."""
    return GpuMemory(shapes, num_blocks, dtype, devices, _best_kernels(devices[0]))


def problem_with(kernels: ModuleType, device: torch.device) -> str | None:
    """Why these kernels cannot be used on the device, found out by a first small step; None if they can."""
    shape = LayerShape(num_heads=1, key_size=16, value_size=16)
    layout = Layout(
        rows_N=np.zeros(2, dtype=np.int32),
        positions_N=np.arange(2, dtype=np.int32),
        tables_SB=np.zeros((1, 1), dtype=np.int32),
        starts=(0, 2),
    )
    try:
        memory = GpuMemory([shape], 1, torch.float32, [device], kernels)
        memory.lay_out(layout)
        ones = torch.ones((1, 1, 2, 16), device=device)
        found = memory.attend(0, ones, ones, ones, AttentionRule(scale=1.0))
        # Whatever the weights are, the mean of ones is one.
        return None if bool((found - 1).abs().max() < 1e-3) else "they answer wrongly"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _best_kernels(device: torch.device) -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        problem: str | None = "triton is missing"
    else:
        from slipstream_server.inference.engine import gpu_attention

        problem = problem_with(gpu_attention, device)
        if problem is None:
            return gpu_attention
    logger.warning("attention runs in plain torch, several times as slow and without graphs: %s", problem)
    return gathered_attention
