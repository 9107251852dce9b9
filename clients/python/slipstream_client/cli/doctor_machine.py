"""The checks of ``slipstream doctor`` that look at the machine: Python, accelerator, memory, disk, and the way to the
hub. Blocking.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from slipstream_client.cli import server_side
from slipstream_client.cli.findings import Finding, fail, ok, warn
from slipstream_client.cli.terminal import in_bytes

OLDEST_PYTHON = (3, 11)
HUB_TIMEOUT_S = 5.0
TORCH_TIMEOUT_S = 90.0
GIB = 1024**3
ENOUGH_MEMORY_BYTES = 4 * GIB
ENOUGH_DISK_BYTES = 5 * GIB
FULL_DISK_BYTES = GIB // 2
# In a process of its own: a broken driver may take its process down.
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
mps = not cuda and torch.backends.mps.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
memory = [torch.cuda.get_device_properties(i).total_memory for i in range(len(names))]
print(json.dumps({"version": torch.__version__, "names": names, "memory": memory, "mps": mps,
                  "built_for": torch.version.cuda, "threads": torch.get_num_threads()}))
"""


def check_python() -> Finding:
    """The interpreter."""
    text = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if sys.version_info < OLDEST_PYTHON:
        return fail("python", text, "install Python 3.11 or newer")
    return ok("python", text)


def check_torch() -> Finding:
    """torch, and the device that models would run on."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return fail("device", f"torch did not start within {TORCH_TIMEOUT_S:g} s", "look at the accelerator's driver")
    if answer.returncode != 0:
        return _torch_trouble(answer.stderr.strip().splitlines()[-1:])
    found = json.loads(answer.stdout)
    if found["names"]:
        devices = zip(found["names"], found["memory"], strict=True)
        cards = ", ".join(f"{name} ({in_bytes(memory)})" for name, memory in devices)
        return ok("device", f"{cards}; torch {found['version']}")
    if found["mps"]:
        return ok("device", f"Apple GPU; torch {found['version']}")
    text = f"CPU, {found['threads']} threads; torch {found['version']}"
    if found["built_for"]:
        return warn("device", f"{text}, built for CUDA {found['built_for']}", "no GPU answers: see nvidia-smi")
    return ok("device", text)


def _torch_trouble(last_line: list[str]) -> Finding:
    said = last_line[0] if last_line else "no message"
    if "No module named 'torch'" in said:
        return warn("device", "torch is not installed: this is a client only", "pip install 'slipstream[worker]'")
    return fail("device", f"torch cannot be used: {said}", "pip install --force-reinstall 'slipstream[worker]'")


def check_memory() -> Finding:
    """Main memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    available = max(free, _available_bytes())
    text = f"{in_bytes(available)} of {in_bytes(total)} available"
    if available < ENOUGH_MEMORY_BYTES:
        return warn("memory", text, "choose a small model, or close something")
    return ok("memory", text)


def _available_bytes() -> int:
    """What Linux would hand out, caches included; 0 elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), 0)


def check_disk(data_dir: Path | None) -> Finding:
    """Room where models and data go."""
    folder = data_dir or Path.home()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{in_bytes(free)} free at {folder}"
    if free < FULL_DISK_BYTES:
        return fail("disk", text, "make room, or choose another --data-dir")
    if free < ENOUGH_DISK_BYTES:
        return warn("disk", text, "a model of 1B parameters takes 2 to 4 GiB")
    return ok("disk", text)


def check_hub() -> Finding:
    """Whether models can be fetched by name."""
    backend = server_side.module()
    if backend is None:
        return ok("hub", "not needed by a client")
    endpoint, is_offline = backend.hub()
    if is_offline:
        return ok("hub", "not asked, HF_HUB_OFFLINE is set")
    if not endpoint.startswith(("https://", "http://")):
        return fail("hub", f"HF_ENDPOINT {endpoint!r} is no http address", "set HF_ENDPOINT to one, or unset it")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - http and https only, see above
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):  # noqa: S310
            return ok("hub", f"{endpoint} answers")
    except urllib.error.HTTPError as error:
        return ok("hub", f"{endpoint} answers (status {error.code})")
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        mend = "use catalogue models (slipstream models list --catalogue) or local folders, or set HF_ENDPOINT"
        return warn("hub", f"{endpoint} does not answer: {why}", mend)
