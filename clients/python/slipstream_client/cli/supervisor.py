"""Keeps the service processes of one machine running: starts, watches, restarts and stops them.

Each has a log file and a session of its own, so that Ctrl-C reaches only the supervisor; each ends when the
supervisor does, even by SIGKILL. What happens is told to ``on_death``. Knows nothing of terminals or gRPC. Lives on
one event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

EXIT_USAGE = 2
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
# A service that ran for so long starts anew with the first backoff.
STEADY_AFTER_S = 60.0
MAX_QUICK_DEATHS = 5
MAX_LOG_BYTES = 16 * 1024 * 1024
TAIL_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A service to run: the module and arguments after ``python -m``, and where its output goes."""

    name: str
    arguments: Sequence[str]
    log_file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """A service ended unasked. ``restart_in_s`` None: it will not be started again, and everything stops."""

    name: str
    exit_code: int
    tail: tuple[str, ...]
    log_file: Path
    restart_in_s: float | None


@dataclass(slots=True)
class Child:
    """One program and its process."""

    program: Program
    on_death: Callable[[Died], None]
    process: asyncio.subprocess.Process | None = None
    quick_deaths: int = 0
    log_start_bytes: int = 0
    started_s: float = field(default_factory=time.monotonic)

    async def keep_running(self) -> None:
        """Start it, and start it again whenever it dies; returns when that is hopeless."""
        while True:
            exit_code = await self._run_once()
            delay_s = self._backoff_s(exit_code)
            tail = tuple(last_lines(self.program.log_file, self.log_start_bytes, TAIL_LINES))
            self.on_death(
                Died(
                    name=self.program.name,
                    exit_code=exit_code,
                    tail=tail,
                    log_file=self.program.log_file,
                    restart_in_s=delay_s,
                )
            )
            if delay_s is None:
                return
            await asyncio.sleep(delay_s)

    async def _run_once(self) -> int:
        self.started_s = time.monotonic()
        with open_log(self.program.log_file) as log:
            self.log_start_bytes = log.tell()
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *self.program.arguments,
                "--exit-with-parent",
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return await self.process.wait()

    def _backoff_s(self, exit_code: int) -> float | None:
        steady = time.monotonic() - self.started_s >= STEADY_AFTER_S
        self.quick_deaths = 1 if steady else self.quick_deaths + 1
        if exit_code == EXIT_USAGE or self.quick_deaths >= MAX_QUICK_DEATHS:
            return None
        return float(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self.quick_deaths - 1)))

    def send(self, signal_number: signal.Signals) -> None:
        """Signal the process, if there is one."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal_number)

    async def ended(self) -> None:
        """Wait until the process has gone."""
        if self.process is not None:
            await self.process.wait()


class Supervisor:
    """All the children of one ``slipstream up``."""

    def __init__(self, programs: Sequence[Program], on_death: Callable[[Died], None]) -> None:
        self._children = [Child(program, on_death) for program in programs]

    async def run(self, stopping: asyncio.Event, *, grace_s: float, on_stopping: Callable[[], None]) -> int:
        """Run everything until ``stopping`` is set (0), or one of them cannot be kept running (1); nothing is left
        when it returns.
        """
        asked = asyncio.create_task(stopping.wait())
        keepers = [asyncio.create_task(child.keep_running(), name=child.program.name) for child in self._children]
        try:
            await asyncio.wait((asked, *keepers), return_when=asyncio.FIRST_COMPLETED)
            hopeless = any(keeper.done() for keeper in keepers)
            stopping.clear()
        finally:
            on_stopping()
            await self._stop(keepers, stopping, grace_s)
            asked.cancel()
        return 1 if hopeless else 0

    async def _stop(self, keepers: Sequence[asyncio.Task[None]], impatient: asyncio.Event, grace_s: float) -> None:
        """SIGTERM for all; SIGKILL for what is left after the grace, or when asked to stop once more."""
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for child in self._children:
            child.send(signal.SIGTERM)
        all_ended = asyncio.create_task(self._all_ended())
        hurried = asyncio.create_task(impatient.wait())
        await asyncio.wait((all_ended, hurried), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        for child in self._children:
            child.send(signal.SIGKILL)
        await all_ended

    async def _all_ended(self) -> None:
        await asyncio.gather(*(child.ended() for child in self._children))


def open_log(path: Path) -> BinaryIO:
    """The log file, to append to; one that has grown large is kept as ``.1`` and begun anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")


def last_lines(path: Path, start_bytes: int, count: int) -> list[str]:
    """The last lines of a text file, of what comes after ``start_bytes``; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start_bytes)
            return [line.decode(errors="replace").rstrip("\n") for line in deque(file, maxlen=count)]
    except OSError:
        return []
