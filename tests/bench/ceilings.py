"""What this machine can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_BUFFER_BYTES = 512 * 2**20
_MATRIX_SIZE = 2048
_TRIES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Bytes a second of copies (read and written ones together) and of reading alone; operations a second of a large
    matrix product. All threads of torch together; the best of some tries.
    """

    copied_bytes_per_s: float
    read_bytes_per_s: float
    operations_per_s: float


def ceilings(dtype: torch.dtype) -> Ceilings:
    """Those of a CPU; products in ``dtype``."""
    source = torch.ones(_BUFFER_BYTES // 4)
    target = torch.zeros_like(source)
    matrix = torch.ones((_MATRIX_SIZE, _MATRIX_SIZE), dtype=dtype)
    return Ceilings(
        copied_bytes_per_s=2 * source.nbytes / _least_s(lambda: target.copy_(source)),
        read_bytes_per_s=source.nbytes / _least_s(source.sum),
        operations_per_s=2 * _MATRIX_SIZE**3 / _least_s(lambda: matrix @ matrix),
    )


def _least_s(run: Callable[[], Any]) -> float:
    run()
    found = []
    for _ in range(_TRIES):
        start_s = time.perf_counter()
        run()
        found.append(time.perf_counter() - start_s)
    return min(found)
