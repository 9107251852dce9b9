"""The program's side of ``tool_process``: reads the request, tells progress, answers once. Main thread of a subprocess;
standard output belongs to the conversation, everything else is written to standard error.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from slipstream_server.errors import ModelLoadFailed, OutOfMemory, SlipstreamError, StorageFull

_NICENESS = 10
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def tell(stage: str, done: int = 0, total: int | None = None, unit: str = "") -> None:
    """Report progress."""
    _write({"stage": stage, "done": done, "total": total, "unit": unit})


def answer(work: Callable[[dict[str, Any]], Mapping[str, Any]]) -> int:
    """Do ``work`` with the request, while nobody else wants the processor; the exit status."""
    os.nice(_NICENESS)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        _write({"result": work(request)})
    except Exception as error:
        traceback.print_exc()
        _write(_described(_as_ours(error)))
        return 1
    return 0


def _end_with_parent() -> None:
    """Standard input closes when the parent closes it or dies."""
    sys.stdin.read()
    os._exit(1)


def _as_ours(error: Exception) -> SlipstreamError:
    """The words of libraries may hold paths and stay in the log."""
    if isinstance(error, SlipstreamError):
        return error
    if (isinstance(error, OSError) and error.errno in _OUT_OF_SPACE) or "No space left" in str(error):
        return StorageFull("the disk of the models is full")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory("there is not enough memory for this model")
    return ModelLoadFailed(f"transformers could not do this with the model ({type(error).__name__})")


def _described(error: SlipstreamError) -> dict[str, Any]:
    violations = [(violation.field, violation.description) for violation in error.violations]
    return {"error": type(error).__name__, "message": error.message, "violations": violations}


def _write(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
