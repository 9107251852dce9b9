"""Arrays on their way to a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """The array as a tensor on ``device``. To a GPU by way of pinned memory, in the order of the current stream: the
    host goes on at once. On a CPU the tensor shares the array's memory.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # The pinned copy is torch's own, kept until the transfer is done.
    return tensor.pin_memory().to(device, non_blocking=True)
