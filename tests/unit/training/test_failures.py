"""How exceptions become reasons, and that what is promised free of torch is."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from slipstream_server.errors import InvalidDataset, ModelLoadFailed
from slipstream_server.training.failures import ExitStatus, classify


def caused_by(cause: BaseException) -> RuntimeError:
    error = RuntimeError("on the way")
    error.__cause__ = cause
    return error


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (OSError(errno.ENOSPC, "full"), "STORAGE_FULL", ExitStatus.STORAGE_FULL),
        (OSError(errno.EDQUOT, "quota"), "STORAGE_FULL", ExitStatus.STORAGE_FULL),
        (caused_by(OSError(errno.ENOSPC, "full")), "STORAGE_FULL", ExitStatus.STORAGE_FULL),
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "STORAGE_FULL",
            ExitStatus.STORAGE_FULL,
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 100672 vs 100564"),
            "STORAGE_FULL",
            ExitStatus.STORAGE_FULL,
        ),
        (OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY", ExitStatus.OUT_OF_MEMORY),
        (MemoryError(), "OUT_OF_MEMORY", ExitStatus.OUT_OF_MEMORY),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "OUT_OF_MEMORY",
            ExitStatus.OUT_OF_MEMORY,
        ),
        (InvalidDataset("line 3: no"), "INVALID_DATASET", ExitStatus.INVALID),
        (ModelLoadFailed("no"), "MODEL_LOAD_FAILED", ExitStatus.FAILED),
    ],
)
def test_error_gets_its_reason(error: BaseException, reason: str, status: ExitStatus) -> None:
    failure = classify(error)
    assert (failure.reason, failure.exit_status) == (reason, status)


def test_unforeseen_error_tells_an_id_and_no_detail(caplog: pytest.LogCaptureFixture) -> None:
    failure = classify(KeyError("/secret/place"))
    assert failure.reason == "INTERNAL"
    assert "secret" not in failure.message
    assert failure.message.split()[-1] in caplog.text


def test_service_side_modules_need_no_torch() -> None:
    names = "rows split examples recipe events spool checkpoints job_folder result failures reporting stopping run"
    imports = "; ".join(f"import slipstream_server.training.{name}" for name in names.split())
    program = f"import sys; {imports}; sys.exit(bool({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
