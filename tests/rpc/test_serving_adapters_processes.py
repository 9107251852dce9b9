"""Inference and chat as processes beside a registry: an adapter named in a chat, or by a conversation, answers it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tests.rpc.adapter_front import Oracle, publish, save_base
from tests.rpc.adapters_kit import adapter_service, refused

from slipstream.adapters.v1 import adapter_service_pb2 as adapters_pb2
from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.chat.v1 import chat_service_pb2_grpc as chat_grpc
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import chat_message_pb2, generation_pb2

pytestmark = pytest.mark.slow

V1, V2 = "adapters/support/versions/v1", "adapters/support/versions/v2"
STOPPING = generation_pb2.StoppingOptions(max_new_tokens=4, ignore_eos=True)
HELLO = chat_message_pb2.ChatMessage(role=chat_message_pb2.ROLE_USER, content="hello")


@contextlib.asynccontextmanager
async def served(
    service: str, folder: Path, *flags: str, **variables: str
) -> AsyncIterator[tuple[grpc.aio.Channel, str]]:
    """A channel to a service of its own process on free ports, and its address."""
    command = [sys.executable, "-m", "slipstream_server.cli", service, "--base-port", "0", "--data-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    process = await asyncio.create_subprocess_exec(
        *command, *flags, stdout=asyncio.subprocess.PIPE, env=environment, cwd=folder
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 90)).decode().split()
        assert line[:2] == [service, "SERVING"], line
        async with grpc.aio.insecure_channel(line[2]) as channel:
            yield channel, line[2]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def test_chats_and_conversations_are_answered_by_the_adapter_they_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "tiny")
    oracle = Oracle(base, tmp_path / "adapters")
    data = tmp_path / "data"
    data.mkdir()
    async with contextlib.AsyncExitStack() as stack:
        registry = await stack.enter_async_context(adapter_service(tmp_path / "registry"))
        await publish(registry, oracle, 1, 2)
        await registry.set_alias("support@live", "v1")
        inference, address = await stack.enter_async_context(
            served(
                "inference", data, "--model", f"tiny={base}", "--device", "cpu",
                SLIPSTREAM_INFERENCE_ADAPTERS_ADDRESS=f"127.0.0.1:{registry.port}",
            )
        )  # fmt: skip
        chat_channel, _ = await stack.enter_async_context(
            served("chat", data, SLIPSTREAM_CHAT_INFERENCE_ADDRESS=address)
        )
        chat = chat_grpc.ChatServiceStub(chat_channel)
        generate = inference_grpc.InferenceServiceStub(inference).Generate
        answer = await generate(inference_pb2.GenerateRequest(text="hi", adapter="support", stopping=STOPPING))
        assert (answer.model, answer.adapter_version) == ("models/tiny", V1)

        options = chat_pb2.GenerationOptions(stopping=STOPPING)
        ask = chat_pb2.CompleteRequest(messages=[HELLO], adapter="support", options=options)
        assert (await chat.Complete(ask)).adapter_version == V1
        assert not (await registry.set_alias("support@live", "v2")).unconfirmed_replicas
        started = [event.started async for event in chat.StreamComplete(ask) if event.HasField("started")]
        assert [event.adapter_version for event in started] == [V2]
        assert (await chat.Complete(chat_pb2.CompleteRequest(messages=[HELLO], options=options))).adapter_version == ""
        unknown = chat_pb2.CompleteRequest(messages=[HELLO], adapter="nobody", options=options)
        assert await refused(chat.Complete(unknown)) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")

        conversation = await chat.CreateConversation(
            chat_pb2.CreateConversationRequest(conversation=chat_pb2.Conversation(adapter="support@v1"))
        )
        send = chat_pb2.SendMessageRequest(parent=conversation.name, message=HELLO, options=options)
        sent = await chat.SendMessage(send)
        assert sent.reply.adapter_version == V1
        await registry.stub.SetActiveAdapter(adapters_pb2.SetActiveAdapterRequest(model="tiny", adapter="support"))
        assert (await chat.Complete(chat_pb2.CompleteRequest(messages=[HELLO], options=options))).adapter_version == V2
