"""Arrays on their way to a device, and tensors on their way from it, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """The array as a tensor on ``device``. To a GPU by way of pinned memory, in the order of the current stream: the
    host goes on at once. On a CPU the tensor shares the array's memory.
    """
    return on_device(torch.from_numpy(array), device)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor itself where it is on ``device``, else as ``to_device``."""
    if tensor.device.type == "cuda" or device.type != "cuda":
        return tensor.to(device)
    # The pinned copy is torch's own, kept until the transfer is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host. What the device is given to do afterwards does not delay it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._has_arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._has_arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._has_arrived.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> Any:
        """Its values, waited for."""
        if self._has_arrived is not None:
            self._has_arrived.synchronize()
        return self._tensor.tolist()
