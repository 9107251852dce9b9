"""Runs a module as a program that never outlives its parent: ``python -m slipstream_server.models.with_parent
PARENT_PID MODULE [ARGUMENTS]`` does what ``python -m MODULE [ARGUMENTS]`` does.

The tie is made before the module is imported, which may take seconds. Linux kills the program when the thread that
started it ends, which waits for it in all uses here; elsewhere a parent that is killed leaves it running. Main thread
of a subprocess; free of torch.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from slipstream_server import errors

_PR_SET_PDEATHSIG = 1


def command(module: str, *arguments: str) -> list[str]:
    """The argument list that runs ``module`` for as long as this process lives."""
    return [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]


def import_path() -> str:
    """PYTHONPATH of a subprocess, which must find this very package, however the parent found it."""
    package_root = str(Path(errors.__file__).parent.parent)
    return os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent, process ``parent_pid``, dies."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    parent_pid, module, *rest = arguments
    die_with_parent(int(parent_pid))
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
