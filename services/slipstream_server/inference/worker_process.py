"""One worker process and the socket to it, from spawn to reaping.

The front listens on a unix socket in a directory that only its user can enter, starts the worker with that path, takes
exactly one connection (from that very process) and unlinks the path. Leaving the context ends the process: asked, told,
then killed with whatever it started. Event loop. Knows frames, not what they mean for requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from slipstream_server.inference.generation import (
    MAX_FRAME_BYTES,
    Command,
    Event,
    Shutdown,
    decode_events,
    encode_command,
)

_log = logging.getLogger(__name__)

_STREAM_BUFFER_BYTES = 1024 * 1024
_STDERR = 2
# What a worker loads lies in a prepared folder: it has no business with a hub.
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
# What a worker's environment says where the operator's does not.
UNLESS_SET = {
    # Threads that spin for long are 4 to 10 times slower where others want the same cores; those that never do lose a
    # quarter of a quiet machine's speed to waking up. Some tens of microseconds are best on two quiet cores.
    "GOMP_SPINCOUNT": "30000",
    # For every weight's shape and every number of rows a product is compiled anew and kept, by oneDNN and by torch's
    # layer above it, 1,024 of them each: steps of all sizes grow a worker by 0.6 to 0.9 MiB apiece, to a gigabyte.
    # 128 hold a decoder's five shapes for the last 25 numbers of rows; what is not there costs a step 1 ms a shape.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLaunch:
    """How to start a worker.

    ``command`` gives the argument list for a socket's path; ``stop_grace_s`` is what it gets to end by itself.
    """

    command: Callable[[Path], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 120.0
    stop_grace_s: float = 5.0


class WorkerGone(Exception):
    """The worker died, or broke the protocol. The message is for logs and status, without paths."""


class WorkerProcess:
    """A running, connected worker."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Write a command without waiting. What is under way is bounded by the dispatcher's credit."""
        if not self._writer.is_closing():
            self._writer.write(encode_command(command))

    async def events(self) -> AsyncIterator[list[Event]]:
        """The events of each engine step; raises WorkerGone at the end."""
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                if size > MAX_FRAME_BYTES:
                    raise WorkerGone(f"sent a frame of {size} bytes")
                yield decode_events(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WorkerGone(await self._epitaph()) from error
        except msgspec.DecodeError as error:
            raise WorkerGone("sent bytes that are no event") from error

    async def _epitaph(self) -> str:
        try:
            code = await asyncio.wait_for(self._process.wait(), timeout=1.0)
        except TimeoutError:
            return "closed its connection"
        return describe_exit(code)


@asynccontextmanager
async def spawn_worker(launch: WorkerLaunch) -> AsyncIterator[WorkerProcess]:
    """Start a worker and connect to it; raises WorkerGone when it does not come.

    Leaving ends it, however it is left.
    """
    directory = Path(tempfile.mkdtemp(prefix="slipstream-"))  # mode 0700
    try:
        async with _listening(directory / "worker.sock") as connection:
            process = await asyncio.create_subprocess_exec(
                *launch.command(directory / "worker.sock"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=_STDERR,  # stdout belongs to the command that started us
                env={**UNLESS_SET, **os.environ, **_OFFLINE, **launch.environment},
                start_new_session=True,
            )
            try:
                reader, writer = await _connected(process, connection, launch.connect_timeout_s)
            except BaseException:
                await _end(process, None, launch.stop_grace_s)
                raise
        try:
            yield WorkerProcess(process, reader, writer)
        finally:
            await _end(process, writer, launch.stop_grace_s)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def _listening(path: Path) -> AsyncIterator[asyncio.Queue[_Connection]]:
    connections: asyncio.Queue[_Connection] = asyncio.Queue()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.put_nowait((reader, writer))

    server = await asyncio.start_unix_server(accept, path, limit=_STREAM_BUFFER_BYTES)
    try:
        yield connections
    finally:
        server.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 (a directory entry of our own)
        while not connections.empty():
            connections.get_nowait()[1].close()


async def _connected(
    process: asyncio.subprocess.Process, connections: asyncio.Queue[_Connection], timeout_s: float
) -> _Connection:
    death = asyncio.ensure_future(process.wait())
    arrival = asyncio.ensure_future(_from_process(process.pid, connections))
    try:
        await asyncio.wait({death, arrival}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if arrival.done():
            return arrival.result()
        if death.done():
            raise WorkerGone(f"{describe_exit(death.result())} before it connected")
        raise WorkerGone(f"did not connect within {timeout_s:g} s")
    finally:
        for waiter in (death, arrival):
            waiter.cancel()
        await asyncio.gather(death, arrival, return_exceptions=True)


async def _from_process(pid: int, connections: asyncio.Queue[_Connection]) -> _Connection:
    """The connection of process ``pid``; others of the same user are closed."""
    while True:
        reader, writer = await connections.get()
        if _peer_pid(writer) in (pid, None):
            return reader, writer
        writer.close()


def _peer_pid(writer: asyncio.StreamWriter) -> int | None:
    if sys.platform != "linux":
        return None
    peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", peer)[0]
    return pid


async def _end(process: asyncio.subprocess.Process, writer: asyncio.StreamWriter | None, grace_s: float) -> None:
    """Shutdown and grace, then SIGKILL to its whole session, so that nothing it started stays."""
    try:
        if writer is not None and process.returncode is None and not writer.is_closing():
            writer.write(encode_command(Shutdown()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s)
    finally:
        if writer is not None:
            writer.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with status {code}"
