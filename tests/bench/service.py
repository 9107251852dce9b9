"""An inference service of its own for a benchmark: started, waited for, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence

START_TIMEOUT_S = 600.0


@contextlib.asynccontextmanager
async def inference_service(model: str, *flags: str) -> AsyncIterator[str]:
    """The address of a service that serves ``model``; its log goes to stderr."""
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder:
        command = [sys.executable, "-m", "slipstream_server.cli", "inference", "--model", model, "--base-port", "0"]
        process = await asyncio.create_subprocess_exec(
            *command, "--data-dir", folder, "--log-level", "WARNING", *flags, stdout=asyncio.subprocess.PIPE
        )
        try:
            yield await asyncio.wait_for(_address(process), START_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async for line in process.stdout:
        words: Sequence[str] = line.decode().split()
        if words[:2] == ["inference", "SERVING"]:
            return words[2]
    raise RuntimeError(f"the service ended with {await process.wait()} before it was SERVING")
