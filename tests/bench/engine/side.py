"""The bench's hold on a side: starts its program, tells it to run, lets it stand still meanwhile, ends it.

A side that is not asked anything is stopped with its whole process tree (SIGSTOP): engines poll, and OpenMP threads
spin. Slipstream's own service is left running, because it does neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.bench.engine.requests import Answer, Request, answer_from, pack
from tests.bench.peers.setup import is_set_up, peer_python

ROOT = Path(__file__).parents[3]
END_TIMEOUT_S = 20.0


class SideFailed(Exception):
    """A side did not start, or died, or could not answer. The message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideKind:
    """A side's program. ``peer``: the environment it needs, None for our own. ``static``: knows no arrivals.

    ``stands_still``: stopped while others run. ``is_slow``: takes part in fewer rounds.
    """

    module: str
    peer: str | None = None
    static: bool = False
    stands_still: bool = True
    is_slow: bool = False
    is_ours: bool = False


KINDS = {
    "grpc": SideKind(module="slipstream_grpc", stands_still=False, is_ours=True),
    "engine": SideKind(module="slipstream_engine", is_ours=True),
    "vllm": SideKind(module="vllm_cpu", peer="vllm"),
    "generate": SideKind(module="generate", static=True, is_slow=True),
    "transformers_cb": SideKind(module="transformers_cb", is_slow=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideOptions:
    """What every side is told at its start."""

    model_folder: Path
    dtype: str
    concurrency: int
    max_tokens: int
    threads: int
    batching: str
    settings: Sequence[str] = ()

    def flags(self) -> list[str]:
        flags = [
            f"--{name.replace('_', '-')}={getattr(self, name)}"
            for name in ("model_folder", "dtype", "concurrency", "max_tokens", "threads", "batching")
        ]
        return [*flags, *(f"--set={setting}" for setting in self.settings)]


class RunningSide:
    """A side that is loaded and stands still."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.kind = KINDS[name]
        self._process = process
        self.facts: dict[str, Any] = self._read()["ready"]
        self._stop()

    def run(self, requests: Sequence[Request]) -> tuple[list[Answer], bool]:
        """The answers, and whether their tokens came one by one."""
        self._signal(signal.SIGCONT)
        try:
            self._write({"requests": [pack(request) for request in requests]})
            reply = self._read()
        finally:
            self._stop()
        return [answer_from(values) for values in reply["answers"]], reply["streams"]

    def close(self) -> None:
        """Ask it to end; after a while, end it with whatever it started."""
        tree = self._tree()
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _stop(self) -> None:
        if self.kind.stands_still:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _write(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(f"{self.name} has ended") from None

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideFailed(f"{self.name} has ended with {self._process.wait()}; its last words are in its log")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise SideFailed(f"{self.name}: {reply['error']}")
        return reply


@contextlib.contextmanager
def running(name: str, options: SideOptions, log: Path) -> Iterator[RunningSide]:
    """A side, loaded; what it says besides goes to ``log``. Raises SideFailed."""
    kind = KINDS[name]
    if kind.peer is not None and not is_set_up(kind.peer):
        raise SideFailed(f"{name} is not set up: run `make bench-peers` first")
    python = Path(sys.executable) if kind.peer is None else peer_python(kind.peer)
    command = [str(python), "-m", f"tests.bench.engine.sides.{kind.module}", *options.flags()]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env=_environment(kind), start_new_session=True,
        )  # fmt: skip
    try:
        side = RunningSide(name, process)
    except SideFailed:
        process.kill()
        raise SideFailed(f"{name} did not start:\n{''.join(log.read_text().splitlines(keepends=True)[-15:])}") from None
    try:
        yield side
    finally:
        side.close()


def _environment(kind: SideKind) -> dict[str, str]:
    """Nothing that favours a side: the number of threads is an option, and compiled modules are kept."""
    left_out = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    if kind.peer == "vllm" and (library := peer_python("vllm").parents[1] / "lib" / "libiomp5.so").exists():
        environment["LD_PRELOAD"] = str(library)  # vLLM asks for it, for best performance
    return environment
