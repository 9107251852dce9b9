"""What an exception out of the model means: too little memory, or a device that is lost."""

from __future__ import annotations

import torch

_CPU_ALLOCATION = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATION)


def is_fatal(error: BaseException) -> bool:
    """Whether the device is in a state that only a new process gets out of."""
    accelerator_error = getattr(torch, "AcceleratorError", None)
    return accelerator_error is not None and isinstance(error, accelerator_error) and not is_out_of_memory(error)
