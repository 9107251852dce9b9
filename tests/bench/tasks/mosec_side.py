"""A mosec server, and callers that speak HTTP/1.1 over one kept connection each.

The callers are written by hand, because every HTTP library costs the peer more than our own client costs us.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench.peers.setup import MOSEC, is_set_up, peer_python
from tests.bench.tasks.side import WORKS, Done, SideFailed
from tests.bench.tasks.slipstream_side import Ask, by_callers

START_TIMEOUT_S = 300.0
BATCH_SIZE = 32


class MosecSide:
    """The server at ``port``; a connection for each caller, opened when first used."""

    def __init__(self, port: int, num_callers: int) -> None:
        self._port = port
        self._num_callers = num_callers
        self._connections: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def run(self, work: str, texts: Sequence[str]) -> Done:
        return await by_callers(texts, self._num_callers, lambda number: self._asker(number, work))

    def facts(self) -> dict[str, Any]:
        return {"versions": list(MOSEC), "max_batch_size": BATCH_SIZE}

    def close(self) -> None:
        for _, writer in self._connections.values():
            writer.close()

    def _asker(self, number: int, work: str) -> Ask:
        async def ask(text: str) -> Sequence[float]:
            if number not in self._connections:
                self._connections[number] = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._connections[number]
            body = text.encode()
            writer.write(b"POST /%b HTTP/1.1\r\nhost: mosec\r\ncontent-length: %d\r\n\r\n" % (work.encode(), len(body)))
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            values = await reader.readexactly(_content_length(head))
            if not head.startswith(b"HTTP/1.1 200"):
                raise SideFailed(f"mosec answered {head.splitlines()[0]!r}: {values[:200]!r}")
            found: list[float] = np.frombuffer(values, dtype="<f4").tolist()
            return found

        return ask


def _content_length(head: bytes) -> int:
    for line in head.lower().splitlines():
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    raise SideFailed("mosec answered without a length")


@contextlib.asynccontextmanager
async def mosec(encoder: Path, classifier: Path, *, num_callers: int, device: str) -> AsyncIterator[MosecSide]:
    """The server with both models, ready."""
    if not is_set_up("mosec"):
        raise SideFailed("mosec is not set up: make bench-peers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {
        **os.environ,
        "PATH": f"{peer_python('mosec').parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "TASKS_ENCODER": str(encoder),
        "TASKS_CLASSIFIER": str(classifier),
        "TASKS_DEVICE": device,
        "TASKS_BATCH_SIZE": str(BATCH_SIZE),
    }
    command = [str(peer_python("mosec")), str(Path(__file__).parent / "mosec_app.py"), "--address", "127.0.0.1"]
    command += ["--port", str(port), "--timeout", "120000", "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)
    side = MosecSide(port, num_callers)
    try:
        await asyncio.wait_for(_until_ready(side, process), START_TIMEOUT_S)
        yield side
    finally:
        side.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _until_ready(side: MosecSide, process: asyncio.subprocess.Process) -> None:
    while process.returncode is None:
        try:
            for work in WORKS:
                await side.run(work, ["ready?"])
            return
        except (OSError, asyncio.IncompleteReadError, SideFailed):
            side.close()
            side._connections.clear()
            await asyncio.sleep(0.5)
    raise SideFailed(f"mosec ended with exit code {process.returncode}")
