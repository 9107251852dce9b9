"""kill -9 of the worker, of the front, of chat: who ends how, who runs on, and what is remembered."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from e2e.services import (
    Running,
    chat_pb2,
    chat_stub,
    generate_request,
    inference_flags,
    inference_stub,
    message_request,
    read_all,
    read_deltas,
    service,
)
from e2e.stranger import Refusal, refusal_of
from slipstream.type.v1 import usage_pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Eventually = Callable[..., Awaitable[None]]
SERVICE = "slipstream.inference.v1.InferenceService"
BATCH = 4
# A new worker imports torch; the machine may be busy.
RESTART_S = 90.0


async def refusal(call: Any) -> Refusal:
    """How a call that was under way ended."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return refusal_of(caught.value)


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Health:
    """What a probe sees of one service, kept up to date in the background."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.seen: list[bool] = []
        self._call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for answer in self._call:
            self.seen.append(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._call.cancel()
        self._task.cancel()


@asynccontextmanager
async def watching(channel: grpc.aio.Channel) -> AsyncIterator[Health]:
    health = Health(channel)
    try:
        yield health
    finally:
        health.close()


async def test_a_killed_worker_takes_only_what_it_had_begun(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    flags = inference_flags(tiny_model, "--max-batch-size", str(BATCH))
    async with (
        service("inference", tmp_path, *flags) as inference,
        grpc.aio.insecure_channel(inference.address) as channel,
        watching(channel) as health,
    ):
        stub = inference_stub(channel)
        await assert_eventually(lambda: health.seen == [True])

        idle = inference.workers()[0]
        idle.kill()
        await assert_eventually(lambda: health.seen == [True, False, True], timeout_s=RESTART_S)
        assert is_gone(idle)

        begun = [stub.StreamGenerate(generate_request()) for _ in range(BATCH)]
        await asyncio.gather(*[read_deltas(call, 3) for call in begun])
        waiting = [asyncio.create_task(read_all(stub.StreamGenerate(generate_request("x", 5)))) for _ in range(8)]
        await assert_eventually(lambda: inference.num_requests() == BATCH + len(waiting))
        inference.workers()[0].kill()
        for call in begun:
            ended = await refusal(call)
            assert (ended.code, ended.reason, ended.domain) == ("UNAVAILABLE", "WORKER_DIED", "slipstream")
        for events in await asyncio.gather(*waiting):
            assert [event.WhichOneof("event") for event in events].count("started") == 1
            assert events[-1].finished.usage.completion_tokens == 5
        assert health.seen == [True, False, True, False, True]
        assert inference.process.returncode is None
        assert inference.num_requests() == 0
        assert inference.metric("slipstream_worker_restarts_total") == 2


async def test_a_worker_killed_in_prefill_gets_its_requests_again(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    async with (
        service("inference", tmp_path, *inference_flags(tiny_model)) as inference,
        grpc.aio.insecure_channel(inference.address) as channel,
    ):
        # Stopped before it is asked, so that the kill comes when the request is on board and no token is.
        worker = inference.workers()[0]
        worker.send_signal(signal.SIGSTOP)
        call = asyncio.create_task(read_all(inference_stub(channel).StreamGenerate(generate_request("a b " * 2000, 3))))
        await assert_eventually(lambda: inference.num_requests() == 1)
        worker.kill()
        events = await asyncio.wait_for(call, RESTART_S)
        assert events[-1].finished.usage.completion_tokens == 3


@asynccontextmanager
async def chat_before(inference: Running, folder: Path) -> AsyncIterator[tuple[Running, Any]]:
    async with (
        service("chat", folder, "--inference-address", inference.address) as chat,
        grpc.aio.insecure_channel(chat.address) as channel,
    ):
        yield chat, chat_stub(channel)


async def stored(stub: Any, parent: str) -> list[tuple[int, int, str]]:
    page = await stub.ListMessages(chat_pb2.ListMessagesRequest(parent=parent))
    return [(message.sequence, message.state, message.message.content) for message in page.messages]


async def test_a_killed_chat_frees_its_rows_and_forgets_nothing(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    complete, incomplete = chat_pb2.Message.STATE_COMPLETE, chat_pb2.Message.STATE_INCOMPLETE
    async with service("inference", tmp_path / "inference", *inference_flags(tiny_model)) as inference:
        async with chat_before(inference, tmp_path / "chat") as (chat, stub):
            parent = (await stub.CreateConversation(chat_pb2.CreateConversationRequest())).name
            first = await stub.SendMessage(message_request(parent, "one", 4, request_id="one"))
            cut = stub.StreamMessage(message_request(parent, "two", request_id="two"))
            await read_deltas(cut, 5)
            chat.kill()
            assert (await refusal(cut)).code == "UNAVAILABLE"
            await assert_eventually(lambda: inference.num_requests() == 0, timeout_s=2.0)
        async with chat_before(inference, tmp_path / "chat") as (_, stub):
            turns = await stored(stub, parent)
            assert [state for _, state, _ in turns] == [complete, complete, complete, incomplete]
            assert turns[1][2] == first.reply.message.content
            last = await stub.GetMessage(chat_pb2.GetMessageRequest(name=f"{parent}/messages/4"))
            assert last.finish_reason == usage_pb2.FINISH_REASON_INCOMPLETE
            again = await stub.SendMessage(message_request(parent, "one", 4, request_id="one"))
            assert again == first
            # The one that was cut is answered anew, in its place.
            resent = stub.StreamMessage(message_request(parent, "two", request_id="two"))
            await read_deltas(resent, 5)
            assert [sequence for sequence, _, _ in await stored(stub, parent)] == [1, 2, 3, 4]
            resent.cancel()
            await assert_eventually(lambda: inference.num_requests() == 0)


async def test_a_killed_front_leaves_no_worker_and_an_incomplete_turn(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    async with (
        service("inference", tmp_path / "inference", *inference_flags(tiny_model)) as inference,
        chat_before(inference, tmp_path / "chat") as (_, stub),
        grpc.aio.insecure_channel(inference.address) as channel,
    ):
        parent = (await stub.CreateConversation(chat_pb2.CreateConversationRequest())).name
        turn = stub.StreamMessage(message_request(parent, "hello"))
        await read_deltas(turn, 5)
        direct = inference_stub(channel).StreamGenerate(generate_request())
        await assert_eventually(lambda: inference.num_requests() == 2)
        worker = inference.workers()[0]
        inference.kill()
        assert (await refusal(direct)).code == "UNAVAILABLE"
        ended = await refusal(turn)
        assert (ended.code, ended.reason) == ("UNAVAILABLE", "DEPENDENCY_UNAVAILABLE")
        await assert_eventually(lambda: is_gone(worker))
        turns = await stored(stub, parent)
        assert [state for _, state, _ in turns] == [chat_pb2.Message.STATE_COMPLETE, chat_pb2.Message.STATE_INCOMPLETE]
        assert turns[1][2]
