"""Real services as processes of their own, on free ports: started, waited for, looked into, and killed at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.chat.v1 import chat_service_pb2_grpc as chat_grpc
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import chat_message_pb2

START_TIMEOUT_S = 240.0
ENDLESS_TOKENS = 30_000
"""More than any test waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A service that has said that it is SERVING."""

    process: asyncio.subprocess.Process
    address: str
    metrics_port: int
    health_port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[psutil.Process]:
        """The worker processes of an inference service."""
        return [child for child in psutil.Process(self.pid).children() if _is_worker(child)]

    def metrics(self) -> dict[str, float]:
        """What the metrics port tells, by name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str) -> float:
        """The sum of one metric over its labels."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def num_requests(self) -> float:
        """Requests in the queue or with the worker."""
        return self.metric("slipstream_num_requests_running") + self.metric("slipstream_num_requests_waiting")

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "slipstream_server.inference.worker" in process.cmdline()
    return False


@asynccontextmanager
async def service(name: str, data_dir: Path, *flags: str, env: dict[str, str] | None = None) -> AsyncIterator[Running]:
    """``python -m slipstream_server.cli NAME``, serving; killed at the end with its children, if they still run."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / f"{name}.log"
    ports = () if any(flag in ("--base-port", "--port") for flag in flags) else ("--base-port", "0")
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "slipstream_server.cli", name, "--data-dir", str(data_dir), *ports, *flags,
            stdout=asyncio.subprocess.PIPE, stderr=errors, env=environment() | (env or {}),
        )  # fmt: skip
    try:
        yield await _running(process, name, log)
    finally:
        await _end(process)


async def _running(process: asyncio.subprocess.Process, name: str, log: Path) -> Running:
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        words = (await process.stdout.readline()).decode().split()
    assert words[:2] == [name, "SERVING"], f"{words}: {log.read_text()[-3000:]}"
    ports = dict(word.split("=") for word in words[3:])
    return Running(
        process=process,
        address=words[2],
        metrics_port=int(ports["metrics"]),
        health_port=int(ports["health"]),
        log=log,
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    await process.wait()


def free_base_port() -> int:
    """A base port for inference and chat, with their ports for metrics and health. Somebody may yet take one."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            base = int(probe.getsockname()[1])
        if base < 60_000 and all(_is_free(base + place + offset) for place in (0, 1) for offset in (0, 1000, 2000)):
            return base
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def environment() -> dict[str, str]:
    """This process's, without settings of Slipstream."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLIPSTREAM_")}
    return kept | {"OMP_NUM_THREADS": "1"}


def inference_flags(model: Path | str, *flags: str) -> Sequence[str]:
    """For one model on one thread."""
    return ("--model", str(model), "--threads", "1", "--max-batch-tokens", str(1 << 20), *flags)


def inference_stub(channel: grpc.aio.Channel) -> Any:
    return inference_grpc.InferenceServiceStub(channel)


def chat_stub(channel: grpc.aio.Channel) -> Any:
    return chat_grpc.ChatServiceStub(channel)


def generate_request(text: str = "hello", max_new_tokens: int = ENDLESS_TOKENS) -> inference_pb2.GenerateRequest:
    """Greedy, and as long as it says."""
    request = inference_pb2.GenerateRequest(text=text)
    request.stopping.max_new_tokens = max_new_tokens
    request.stopping.ignore_eos = True
    return request


def message_request(
    parent: str, text: str = "hello", max_new_tokens: int = ENDLESS_TOKENS, request_id: str = ""
) -> chat_pb2.SendMessageRequest:
    """A turn of a stored conversation."""
    request = chat_pb2.SendMessageRequest(parent=parent, request_id=request_id)
    request.message.role = chat_message_pb2.ROLE_USER
    request.message.content = text
    request.options.stopping.max_new_tokens = max_new_tokens
    request.options.stopping.ignore_eos = True
    return request


async def read_deltas(call: Any, count: int) -> int:
    """Read until ``count`` deltas have come; how many did."""
    seen = 0
    async for event in call:
        seen += event.WhichOneof("event") == "delta"
        if seen >= count:
            break
    return seen


async def read_all(call: Any) -> list[Any]:
    return [event async for event in call]
