"""ChatService over real gRPC, with a scripted inference service behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2, status_pb2

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.chat.v1 import chat_service_pb2_grpc as chat_grpc
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import chat_message_pb2, usage_pb2
from slipstream_server.chat.conversations import Conversations
from slipstream_server.chat.tables import SCHEMA
from slipstream_server.chat.turns import Turns
from slipstream_server.config import ListenConfig
from slipstream_server.errors import InvalidField, QueueFull, WorkerDied
from slipstream_server.rpc.channels import Peer, open_channel
from slipstream_server.rpc.chat.servicer import ChatServicer
from slipstream_server.rpc.chat.upstream import InferenceUpstream
from slipstream_server.rpc.server import Mount, open_server
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate

USAGE = usage_pb2.Usage(prompt_tokens=7, completion_tokens=2)


@dataclass
class ScriptedInference(inference_grpc.InferenceServiceServicer):
    """Answers with ``words``, then raises ``failure`` or waits; keeps what it was asked."""

    words: tuple[str, ...] = ("Hello ", "there")
    failure: Exception | None = None
    waits: bool = False
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    deadlines_s: list[float | None] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    num_running: int = 0

    def _note(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.deadlines_s.append(context.time_remaining())
        self.request_ids.append(dict(context.invocation_metadata()).get("x-request-id", ""))

    async def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        self._note(request, context)
        if self.failure is not None:
            raise self.failure
        completion = inference_pb2.Completion(text="".join(self.words), finish_reason=usage_pb2.FINISH_REASON_EOS_TOKEN)
        return inference_pb2.GenerateResponse(completions=[completion], usage=USAGE, model="models/m")

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        self._note(request, context)
        self.num_running += 1
        try:
            started = inference_pb2.GenerationStarted(model="models/m", adapter_version="adapters/a/versions/v1")
            yield inference_pb2.StreamGenerateResponse(started=started)
            for word in self.words:
                yield inference_pb2.StreamGenerateResponse(delta=inference_pb2.GenerationDelta(text=word))
            if self.failure is not None:
                raise self.failure
            if self.waits:
                await asyncio.Event().wait()
            ended = inference_pb2.Completion(finish_reason=usage_pb2.FINISH_REASON_EOS_TOKEN)
            finished = inference_pb2.GenerationFinished(usage=USAGE, completions=[ended])
            yield inference_pb2.StreamGenerateResponse(finished=finished)
        finally:
            self.num_running -= 1


@dataclass
class Chat:
    """A stub of a running chat service, and the inference service behind it."""

    stub: chat_grpc.ChatServiceAsyncStub
    inference: ScriptedInference

    async def stored(self, name: str = "conversations/talk") -> list[tuple[str, int]]:
        page = await self.stub.ListMessages(chat_pb2.ListMessagesRequest(parent=name))
        return [(message.message.content, message.state) for message in page.messages]


@asynccontextmanager
async def running_chat(folder: Path) -> AsyncIterator[Chat]:
    inference = ScriptedInference()
    database = Database(DatabaseConfig.sqlite(folder / "chat.db"))
    await migrate(database, SCHEMA)
    conversations = Conversations(database)
    add_inference = inference_grpc.add_InferenceServiceServicer_to_server
    async with (
        open_server([Mount(add_inference, inference)], ListenConfig()) as upstream,
        open_channel(Peer(address=f"127.0.0.1:{upstream.port}")) as channel,
        open_server(
            [
                Mount(
                    chat_grpc.add_ChatServiceServicer_to_server,
                    ChatServicer(InferenceUpstream(channel), conversations, Turns(database, conversations)),
                )
            ],
            ListenConfig(),
        ) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as client,
    ):
        yield Chat(chat_grpc.ChatServiceStub(client), inference)
    await database.close()


@pytest.fixture
async def chat(tmp_path: Path) -> AsyncIterator[Chat]:
    async with running_chat(tmp_path) as chat:
        await chat.stub.CreateConversation(
            chat_pb2.CreateConversationRequest(
                conversation_id="talk",
                conversation=chat_pb2.Conversation(model="m", adapter="a@live", system_message="Be brief."),
            )
        )
        yield chat


def user(text: str) -> chat_message_pb2.ChatMessage:
    return chat_message_pb2.ChatMessage(role=chat_message_pb2.ROLE_USER, content=text)


def turn(text: str, request_id: str = "") -> chat_pb2.SendMessageRequest:
    return chat_pb2.SendMessageRequest(parent="conversations/talk", message=user(text), request_id=request_id)


def details(error: grpc.aio.AioRpcError) -> tuple[str, list[str]]:
    """Reason and violated fields."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
    return info.reason, [violation.field for violation in bad.field_violations]


async def test_complete_passes_messages_and_options_on_and_the_answer_back(chat: Chat) -> None:
    request = chat_pb2.CompleteRequest(model="m", adapter="a@v1", messages=[user("Hi")])
    request.options.sampling.temperature = 0.5
    request.options.stopping.max_new_tokens = 9
    request.options.logprobs = 2
    answer = await chat.stub.Complete(request)
    asked = chat.inference.requests[0]
    assert (asked.model, asked.adapter, asked.chat.messages[0].content) == ("m", "a@v1", "Hi")
    assert (asked.sampling.temperature, asked.stopping.max_new_tokens, asked.response.logprobs) == (0.5, 9, 2)
    assert not asked.sampling.HasField("top_p")
    assert answer.message.content == "Hello there"
    assert answer.message.role == chat_message_pb2.ROLE_ASSISTANT
    assert answer.usage == USAGE


async def test_stream_complete_is_started_deltas_finished(chat: Chat) -> None:
    events = [event async for event in chat.stub.StreamComplete(chat_pb2.CompleteRequest(messages=[user("Hi")]))]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "finished"]
    assert "".join(event.delta.text for event in events) == "Hello there"
    assert events[-1].finished.finish_reason == usage_pb2.FINISH_REASON_EOS_TOKEN


async def test_deadline_and_request_id_travel_on(chat: Chat) -> None:
    await chat.stub.Complete(
        chat_pb2.CompleteRequest(messages=[user("Hi")]), timeout=30, metadata=[("x-request-id", "abc")]
    )
    assert chat.inference.deadlines_s[0] is not None
    assert 0 < chat.inference.deadlines_s[0] < 31  # gRPC rounds a timeout up when it writes it
    assert chat.inference.request_ids == ["abc"]


async def test_a_client_that_leaves_ends_the_call_behind(chat: Chat, assert_eventually: Any) -> None:
    chat.inference.waits = True
    call = chat.stub.StreamComplete(chat_pb2.CompleteRequest(messages=[user("Hi")]))
    await call.read()
    assert chat.inference.num_running == 1
    call.cancel()
    await assert_eventually(lambda: chat.inference.num_running == 0, timeout_s=2)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("chat.messages[3].role", "messages[3].role"),
        ("sampling.top_p", "options.sampling.top_p"),
        ("stopping.max_new_tokens", "options.stopping.max_new_tokens"),
        ("response.logprobs", "options.logprobs"),
        ("model", "model"),
    ],
)
async def test_errors_name_the_fields_of_the_chat_contract(chat: Chat, inner: str, outer: str) -> None:
    chat.inference.failure = InvalidField.of(inner, "is bad")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.Complete(chat_pb2.CompleteRequest(messages=[user("Hi")]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value) == ("INVALID_FIELD", [outer])
    assert caught.value.details() == f"{outer}: is bad"


async def test_a_turn_carries_the_conversations_model_adapter_and_system_message(chat: Chat) -> None:
    response = await chat.stub.SendMessage(turn("Hi"))
    asked = chat.inference.requests[0]
    assert (asked.model, asked.adapter) == ("m", "a@live")
    assert [message.content for message in asked.chat.messages] == ["Be brief.", "Hi"]
    assert response.reply.name == "conversations/talk/messages/2"
    assert response.reply.message.content == "Hello there"
    assert (response.reply.model, response.reply.adapter_version) == ("models/m", "adapters/a/versions/v1")
    got = await chat.stub.GetMessage(chat_pb2.GetMessageRequest(name=response.reply.name))
    assert got == response.reply


async def test_stream_message_names_both_messages_and_ends_with_the_stored_reply(chat: Chat) -> None:
    events = [event async for event in chat.stub.StreamMessage(turn("Hi"))]
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "finished"]
    assert events[0].started.message.message == user("Hi")
    assert events[0].started.reply == events[-1].finished.reply.name == "conversations/talk/messages/2"
    assert events[-1].finished.reply.state == chat_pb2.Message.STATE_COMPLETE


async def test_a_repeat_by_request_id_adds_no_turn_whichever_way_it_comes(chat: Chat) -> None:
    first = await chat.stub.SendMessage(turn("Hi", "r1"))
    events = [event async for event in chat.stub.StreamMessage(turn("Hi", "r1"))]
    assert events[-1].finished.reply == first.reply
    assert len(chat.inference.requests) == 1
    assert len(await chat.stored()) == 2


async def test_a_turn_cut_short_behind_is_stored_as_incomplete(chat: Chat) -> None:
    chat.inference.failure = WorkerDied("the worker died")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.SendMessage(turn("Hi"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value)[0] == "WORKER_DIED"
    assert await chat.stored() == [
        ("Hi", chat_pb2.Message.STATE_COMPLETE),
        ("Hello there", chat_pb2.Message.STATE_INCOMPLETE),
    ]


async def test_a_client_that_leaves_a_turn_leaves_it_incomplete(chat: Chat, assert_eventually: Any) -> None:
    chat.inference.waits = True
    call = chat.stub.StreamMessage(turn("Hi"))
    for _ in range(2):
        await call.read()
    call.cancel()
    await assert_eventually(lambda: chat.inference.num_running == 0, timeout_s=2)
    for _ in range(200):
        if (await chat.stored())[-1][1] == chat_pb2.Message.STATE_INCOMPLETE:
            break
        await asyncio.sleep(0.01)
    assert (await chat.stored())[-1][1] == chat_pb2.Message.STATE_INCOMPLETE


async def test_a_full_queue_is_passed_on_with_when_to_come_back(chat: Chat) -> None:
    chat.inference.words, chat.inference.failure = (), QueueFull("the queue is full", retry_after_s=2.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.Complete(chat_pb2.CompleteRequest(messages=[user("Hi")]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = status_pb2.Status.FromString(dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details if detail.Is(retry.DESCRIPTOR))
    assert retry.retry_delay.ToMilliseconds() == 2500


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (chat_pb2.SendMessageRequest(parent="conversations/talk"), "message.role"),
        (turn(""), "message.content"),
        (turn("a\0b"), "message.content"),
        (turn("x", "i" * 65), "request_id"),
        (chat_pb2.SendMessageRequest(parent="../x", message=user("x")), "parent"),
    ],
)
async def test_a_bad_turn_is_refused_by_field(
    chat: Chat, request_message: chat_pb2.SendMessageRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.SendMessage(request_message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value) == ("INVALID_FIELD", [field])
    assert await chat.stored() == []


async def test_only_known_paths_can_be_updated(chat: Chat) -> None:
    conversation = chat_pb2.Conversation(name="conversations/talk", title="New")
    request = chat_pb2.UpdateConversationRequest(
        conversation=conversation, update_mask=FieldMask(paths=["title", "system_message"])
    )
    updated = await chat.stub.UpdateConversation(request)
    assert (updated.title, updated.system_message, updated.model) == ("New", "", "m")
    request.update_mask.paths[:] = ["owner"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.UpdateConversation(request)
    assert details(caught.value) == ("INVALID_FIELD", ["update_mask"])


async def test_conversations_are_listed_and_deleted(chat: Chat) -> None:
    await chat.stub.CreateConversation(chat_pb2.CreateConversationRequest(conversation_id="second"))
    page = await chat.stub.ListConversations(chat_pb2.ListConversationsRequest(page_size=1))
    assert [item.name for item in page.conversations] == ["conversations/second"]
    await chat.stub.DeleteConversation(chat_pb2.DeleteConversationRequest(name="conversations/second"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.GetConversation(chat_pb2.GetConversationRequest(name="conversations/second"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)[0] == "CONVERSATION_NOT_FOUND"


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("chat.messages[1].parts[0].image", "message.parts[0].image"),
        ("chat.messages[0].content", "conversation.system_message"),
        ("chat.messages", "message"),
        ("sampling.top_p", "options.sampling.top_p"),
        ("model", "conversation.model"),
        ("adapter", "conversation.adapter"),
    ],
)
async def test_errors_of_a_turn_name_the_fields_of_the_turn(chat: Chat, inner: str, outer: str) -> None:
    chat.inference.words = ()
    chat.inference.failure = InvalidField.of(inner, "is bad")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.SendMessage(turn("Hi"))
    assert details(caught.value) == ("INVALID_FIELD", [outer])


@pytest.mark.parametrize(("field", "value"), [("model", "../x"), ("model", "models/a/b"), ("adapter", "../x")])
async def test_a_conversation_names_nothing_that_could_not_exist(chat: Chat, field: str, value: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        conversation = chat_pb2.Conversation(**{field: value})
        await chat.stub.CreateConversation(chat_pb2.CreateConversationRequest(conversation=conversation))
    assert details(caught.value) == ("INVALID_FIELD", [f"conversation.{field}"])
