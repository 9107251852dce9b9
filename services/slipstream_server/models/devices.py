"""Which devices this machine has and how much memory each, found without torch.

GPUs as the driver's own tool lists them; the CPU's memory is the machine's, or what the control group allows. Blocks
for as long as that tool takes (a second at most where there is a GPU); any thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

CPU = "cpu"
_TOOL_TIMEOUT_S = 10.0
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device_memory() -> Mapping[str, int]:
    """Bytes by device: "cpu" always, "cuda:0" and so on where there are GPUs."""
    return {CPU: _cpu_bytes(), **_cuda_bytes()}


def _cpu_bytes() -> int:
    total: int = psutil.virtual_memory().total
    try:
        allowed = int(_CGROUP_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return total
    return min(total, allowed)


def _cuda_bytes() -> dict[str, int]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=True).stdout
        rows = [line.split(",") for line in answer.splitlines() if line.strip()]
        found = {int(index): int(mebibytes) * 1024**2 for index, mebibytes in rows}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    # The driver lists all; this process may use those it is shown, and counts them anew.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    order = sorted(found) if visible is None else [int(item) for item in visible.split(",") if item.strip().isdecimal()]
    return {f"cuda:{place}": found[index] for place, index in enumerate(order) if index in found}
