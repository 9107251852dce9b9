"""How a run ends, as a reason for people and an exit status for the launcher.

Launchers turn every status but 0 into 1, so the spool's last event is what counts; the status is for those who start
the runner by hand. torch is looked at only by name: this module is imported before it. Pure functions; any thread.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from slipstream_server.errors import InvalidDataset, InvalidRequest, OutOfMemory, SlipstreamError, StorageFull
from slipstream_server.logs import log_failure


class ExitStatus(IntEnum):
    """The runner's exit statuses; those that sysexits.h has keep their meaning."""

    FINISHED = 0
    INVALID = 65
    FAILED = 70
    OUT_OF_MEMORY = 71
    STORAGE_FULL = 74
    STOPPED = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed: ``reason`` is an ErrorReason without its prefix, ``message`` is fit for the user."""

    reason: str
    message: str
    exit_status: ExitStatus


def classify(error: BaseException) -> Failure:
    """What ``error`` means for the job. What nobody foresaw is logged with its traceback under an id that the message
    names.
    """
    chain = list(_causes(error))
    if any(_is_storage_full(cause) for cause in chain):
        message = "the disk that holds the job's files is full or cannot be written"
        return Failure(reason=StorageFull.reason, message=message, exit_status=ExitStatus.STORAGE_FULL)
    if any(_is_out_of_memory(cause) for cause in chain):
        message = "not enough memory; a smaller batch_size_per_device or max_length needs less"
        return Failure(reason=OutOfMemory.reason, message=message, exit_status=ExitStatus.OUT_OF_MEMORY)
    if isinstance(error, SlipstreamError):
        is_invalid = isinstance(error, (InvalidRequest, InvalidDataset))
        status = ExitStatus.INVALID if is_invalid else ExitStatus.FAILED
        return Failure(reason=error.reason, message=error.message, exit_status=status)
    error_id = log_failure(error, "training")
    message = f"training failed unexpectedly; the runner's log tells more under error_id {error_id}"
    return Failure(reason=SlipstreamError.reason, message=message, exit_status=ExitStatus.FAILED)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(16):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


# What torch.save and safetensors say where the system's error was no space: they write natively and lose its number.
_FAILED_WRITES = (
    "No space left on device",
    "os error 28",
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
    "iostream error",
)


def _is_storage_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(text in str(error) for text in _FAILED_WRITES)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and (
        "not enough memory" in str(error) or "can't allocate memory" in str(error)
    )
