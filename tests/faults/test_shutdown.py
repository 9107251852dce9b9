"""SIGTERM under load, and the end of ``slipstream up`` in every way: calls end as promised, no process stays."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from e2e.services import (
    chat_pb2,
    chat_stub,
    environment,
    free_base_port,
    generate_request,
    inference_flags,
    inference_stub,
    message_request,
    read_all,
    read_deltas,
    service,
)
from e2e.stranger import refusal_of
from faults.test_processes_killed import is_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Eventually = Callable[..., Awaitable[None]]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def end_of(call: Any) -> str:
    """``finished``, or the reason of the failure."""
    try:
        return str((await read_all(call))[-1].WhichOneof("event"))
    except grpc.aio.AioRpcError as error:
        refused = refusal_of(error)
        assert (refused.code, refused.retry_s is not None) == ("UNAVAILABLE", True)
        return refused.reason


async def status(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)


@pytest.mark.parametrize("name", ["inference", "chat"])
@pytest.mark.parametrize(("grace_s", "max_new_tokens", "end"), [(60, 3000, "finished"), (1, 30_000, "DRAINING")])
async def test_sigterm_lets_calls_finish_within_the_grace(
    tmp_path: Path,
    tiny_model: Path,
    assert_eventually: Eventually,
    name: str,
    grace_s: int,
    max_new_tokens: int,
    end: str,
) -> None:
    grace = ("--drain-grace-s", str(grace_s))
    async with (
        service("inference", tmp_path / "inference", *inference_flags(tiny_model, *grace)) as inference,
        service("chat", tmp_path / "chat", "--inference-address", inference.address, *grace) as chat,
        grpc.aio.insecure_channel(inference.address) as channel,
        grpc.aio.insecure_channel(chat.address) as chat_channel,
    ):
        stub, chats = inference_stub(channel), chat_stub(chat_channel)
        parent = (await chats.CreateConversation(chat_pb2.CreateConversationRequest())).name
        target = {"inference": inference, "chat": chat}[name]
        calls = [chats.StreamMessage(message_request(parent, max_new_tokens=max_new_tokens))]
        if name == "inference":
            calls += [stub.StreamGenerate(generate_request(max_new_tokens=max_new_tokens)) for _ in range(3)]
        # The turn may wait behind the others: a batch that has begun takes nobody in.
        await read_deltas(calls[-1], 3)
        await assert_eventually(lambda: inference.num_requests() == len(calls))
        ends = [asyncio.create_task(end_of(call)) for call in calls]
        target.kill(signal.SIGTERM)

        async def both() -> bool:
            return {await status(target.address), await status(f"127.0.0.1:{target.health_port}")} == {NOT_SERVING}

        while not await both():
            assert target.process.returncode is None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (
                stub.Generate(generate_request())
                if name == "inference"
                else chats.GetConversation(chat_pb2.GetConversationRequest(name=parent))
            )
        refused = refusal_of(caught.value)
        assert (refused.code, refused.reason, refused.retry_s is not None) == ("UNAVAILABLE", "DRAINING", True)
        assert set(await asyncio.gather(*ends)) == {end}
        workers = inference.workers() if name == "chat" else []
        assert await asyncio.wait_for(target.process.wait(), 30) == 0
        assert not any(map(is_gone, workers))  # chat's end is none of theirs
        if name == "chat":
            await assert_eventually(lambda: inference.num_requests() == 0)


@asynccontextmanager
async def up(folder: Path, model: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[psutil.Process], str]]:
    """``slipstream up`` with inference and chat, ready; its descendants and the address of inference."""
    arguments = ("-m", "slipstream_client.cli", "up", "--data-dir", str(folder), "--model", str(model))
    only = ("--only", "inference", "--only", "chat", "--set", "inference.threads=1")
    ports = ("--base-port", str(free_base_port()))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, *only, *ports, stdout=asyncio.subprocess.PIPE, cwd=folder, env=environment()
    )
    descendants: list[psutil.Process] = []
    try:
        lines = await asyncio.wait_for(_until_ready(process), 120)
        descendants = psutil.Process(process.pid).children(recursive=True)
        yield process, descendants, next(words[2] for words in lines if words[:2] == ["inference", "SERVING"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        for left in descendants:
            if left.is_running():
                left.kill()


async def _until_ready(process: asyncio.subprocess.Process) -> list[list[str]]:
    assert process.stdout is not None
    lines: list[list[str]] = []
    async for line in process.stdout:
        lines.append(line.decode().split())
        if lines[-1] == ["ready"]:
            return lines
    raise AssertionError(f"up ended with {await process.wait()} after {lines}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_up_takes_everything_with_it(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually, number: signal.Signals
) -> None:
    async with up(tmp_path, tiny_model) as (process, descendants, address):
        assert len(descendants) >= 3  # inference, its worker, chat
        async with grpc.aio.insecure_channel(address) as channel:
            call = inference_stub(channel).StreamGenerate(generate_request(max_new_tokens=500))
            await read_deltas(call, 3)
            process.send_signal(number)
            if number is signal.SIGKILL:
                call.cancel()
            else:
                assert await end_of(call) == "finished"
        assert await asyncio.wait_for(process.wait(), 60) == (-9 if number is signal.SIGKILL else 0)
        await assert_eventually(lambda: all(map(is_gone, descendants)), timeout_s=30)
