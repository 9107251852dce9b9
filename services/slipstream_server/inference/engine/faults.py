"""What an exception out of the model means: too little memory, a device that is lost, or a bug to log."""

from __future__ import annotations

import logging
import secrets

import torch

logger = logging.getLogger(__name__)

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


def log_failure(error: BaseException, doing: str) -> str:
    """Log the traceback; returns the id under which it stands there."""
    failure_id = secrets.token_hex(4)
    logger.error("failure %s while %s", failure_id, doing, exc_info=error)
    return failure_id
