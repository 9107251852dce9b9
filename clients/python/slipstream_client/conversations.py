"""Stored conversations: ``client.conversations``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Unpack

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.chat.v1 import chat_service_pb2_grpc
from slipstream_client import convert, options, requests
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.options import AnswerOptions, CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import plain, word_of
from slipstream_client.results import ChatDelta, ChatMessage, FinishReason, Usage
from slipstream_client.spelling import message_of
from slipstream_client.streams import AnswerStream, Outcome, check_finished

SERVICE = "chat"
SETTINGS = ("title", "model", "adapter", "system_message", "metadata")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation without its messages. An alias in ``adapter`` is resolved anew at each turn."""

    name: str
    title: str
    model: str
    adapter: str
    system_message: str
    metadata: Mapping[str, str]
    owner: str
    message_count: int
    create_time: datetime | None
    update_time: datetime | None
    etag: str

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationMessage:
    """A stored message. ``state``: complete, generating, or incomplete where the turn was cut short."""

    name: str
    message: ChatMessage
    state: str
    finish_reason: FinishReason
    usage: Usage
    model: str
    adapter_version: str
    create_time: datetime | None
    sequence: int

    @property
    def text(self) -> str:
        return self.message.content


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was said, and the answer; both stored."""

    message: ConversationMessage
    reply: ConversationMessage

    @property
    def text(self) -> str:
        return self.reply.text


class TurnOptions(AnswerOptions, total=False):
    """Keyword arguments of ``send`` and ``stream_message``; model and adapter are the conversation's.

    ``request_id`` makes a turn safe to repeat, by hand too: a stored answer is returned as it is, and one that was
    cut short is answered anew in its place.
    """


@dataclass(slots=True)
class TurnOutcome(Outcome):
    """How a streamed turn went so far."""

    message: ConversationMessage | None = None
    reply: ConversationMessage | None = None
    reply_name: str = ""


class MessageStream(AnswerStream[ChatDelta]):
    """An answer while it comes; ``message`` is known from the first event on, ``reply`` at the end."""

    def __init__(self, deltas: AsyncGenerator[ChatDelta], outcome: TurnOutcome) -> None:
        super().__init__(deltas, outcome)
        self._turn = outcome

    @property
    def message(self) -> ConversationMessage | None:
        """What was said, as stored."""
        return self._turn.message

    @property
    def reply(self) -> ConversationMessage | None:
        """The answer, whole, as stored."""
        return self._turn.reply

    @property
    def reply_name(self) -> str:
        """The resource name of the answer, to look it up where the stream was lost."""
        return self._turn.reply_name


class Conversations:
    """Conversations that the service keeps. Names are ids (``c1``) or resource names (``conversations/c1``)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def stub(self) -> chat_service_pb2_grpc.ChatServiceAsyncStub:
        """The raw stub."""
        return chat_service_pb2_grpc.ChatServiceStub(self._connection.channel(SERVICE))

    async def create(
        self,
        conversation_id: str = "",
        *,
        title: str = "",
        model: str = "",
        adapter: str = "",
        system_message: str = "",
        metadata: Mapping[str, str] | None = None,
        **call: Unpack[CallOptions],
    ) -> Conversation:
        """Create an empty conversation. A repeat after a lost connection does not make a second one."""
        about = dict(zip(SETTINGS, (title, model, adapter, system_message, metadata), strict=True))
        request = message_of(
            chat_pb2.CreateConversationRequest, "", {"conversation": about, "conversation_id": conversation_id}
        )
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        answer = await self._connection.unary(SERVICE, self.stub.CreateConversation, request, **call)
        return plain(Conversation, answer)

    async def get(self, name: str, **call: Unpack[CallOptions]) -> Conversation:
        """One conversation. Raises NotFoundError."""
        request = chat_pb2.GetConversationRequest(name=full_name(name))
        return plain(Conversation, await self._connection.unary(SERVICE, self.stub.GetConversation, request, **call))

    async def list(self, *, limit: int | None = None, **call: Unpack[CallOptions]) -> list[Conversation]:
        """The caller's conversations, the last updated first."""
        return await all_pages(
            self._connection,
            SERVICE,
            self.stub.ListConversations,
            chat_pb2.ListConversationsRequest(),
            lambda page: [plain(Conversation, conversation) for conversation in page.conversations],
            limit=limit,
            **call,
        )

    async def update(
        self,
        name: str,
        *,
        title: str | None = None,
        model: str | None = None,
        adapter: str | None = None,
        system_message: str | None = None,
        metadata: Mapping[str, str] | None = None,
        etag: str = "",
        **call: Unpack[CallOptions],
    ) -> Conversation:
        """Change what is given, to empty too. With the ``etag`` that was read, AbortedError where it is stale."""
        given = zip(SETTINGS, (title, model, adapter, system_message, metadata), strict=True)
        changes = {key: value for key, value in given if value is not None}
        conversation = {"name": full_name(name), "etag": etag, **changes}
        request = message_of(chat_pb2.UpdateConversationRequest, "", {"conversation": conversation})
        request.update_mask.paths.extend(changes)
        return plain(Conversation, await self._connection.unary(SERVICE, self.stub.UpdateConversation, request, **call))

    async def delete(self, name: str, *, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Delete a conversation and its messages."""
        request = chat_pb2.DeleteConversationRequest(name=full_name(name), etag=etag)
        await self._connection.unary(SERVICE, self.stub.DeleteConversation, request, **call)

    async def messages(
        self, name: str, *, limit: int | None = None, **call: Unpack[CallOptions]
    ) -> tuple[ConversationMessage, ...]:
        """The messages of a conversation, oldest first."""
        found = await all_pages(
            self._connection,
            SERVICE,
            self.stub.ListMessages,
            chat_pb2.ListMessagesRequest(parent=full_name(name)),
            lambda page: map(stored_message, page.messages),
            limit=limit,
            **call,
        )
        return tuple(found)

    async def message(self, name: str, **call: Unpack[CallOptions]) -> ConversationMessage:
        """One message, ``conversations/c1/messages/2``."""
        request = chat_pb2.GetMessageRequest(name=name)
        return stored_message(await self._connection.unary(SERVICE, self.stub.GetMessage, request, **call))

    async def send(self, name: str, message: str | options.Message, **given: Unpack[TurnOptions]) -> Turn:
        """Say something and get the answer; both are stored when this returns, once, however often it is repeated."""
        request, call = _turn_request(name, message, given, "send")
        answer = await self._connection.unary(SERVICE, self.stub.SendMessage, request, **call)
        return Turn(message=stored_message(answer.message), reply=stored_message(answer.reply))

    def stream_message(self, name: str, message: str | options.Message, **given: Unpack[TurnOptions]) -> MessageStream:
        """Say something and get the answer as it comes.

        Repeated by itself until the first delta. Where it is lost later, ask again with the stream's ``request_id``.
        """
        request, call = _turn_request(name, message, given, "stream_message")
        events = self._connection.stream(SERVICE, self.stub.StreamMessage, request, is_answer=_is_delta, **call)
        outcome = TurnOutcome(request.request_id)
        return MessageStream(_deltas(events, outcome), outcome)


def _turn_request(
    name: str, message: str | options.Message, given: Any, call_name: str
) -> tuple[chat_pb2.SendMessageRequest, CallOptions]:
    values = dict(given)
    request_id = checked_request_id(values.pop("request_id", None))
    call = CallOptions(timeout_s=values.pop("timeout_s", None), request_id=request_id)
    allowed = set(TurnOptions.__annotations__) - {"model", "adapter"}
    arguments = requests.Arguments(call_name, allowed, values)
    said = ChatMessage(role="user", content=message) if isinstance(message, str) else message
    request = chat_pb2.SendMessageRequest(
        parent=full_name(name),
        message=requests.message_to_proto(said, "message"),
        options=requests.generation_options(arguments),
        request_id=request_id,
    )
    arguments.finish()
    return request, call


async def _deltas(
    events: AsyncGenerator[chat_pb2.StreamMessageResponse], outcome: TurnOutcome
) -> AsyncGenerator[ChatDelta]:
    try:
        async for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                outcome.model, outcome.adapter_version = event.started.model, event.started.adapter_version
                outcome.message = stored_message(event.started.message)
                outcome.reply_name = event.started.reply
            elif kind == "delta":
                delta = convert.chat_delta(event.delta)
                outcome.texts[0] = outcome.texts.get(0, "") + delta.text
                yield delta
            elif kind == "finished":
                _note_finished(stored_message(event.finished.reply), outcome)
        check_finished(outcome)
    finally:
        await events.aclose()


def _note_finished(reply: ConversationMessage, outcome: TurnOutcome) -> None:
    """The stored answer is the whole of it, also where a repeat was answered without deltas."""
    outcome.reply = reply
    outcome.texts[0] = reply.text
    outcome.usage, outcome.finish_reasons[0] = reply.usage, reply.finish_reason
    outcome.finished = True


def _is_delta(event: chat_pb2.StreamMessageResponse) -> bool:
    return event.HasField("delta")


def full_name(name: str) -> str:
    """``conversations/c1`` for ``c1``."""
    return name if "/" in name else f"conversations/{name}"


def stored_message(proto: chat_pb2.Message) -> ConversationMessage:
    """The result for a stored message."""
    return ConversationMessage(
        name=proto.name,
        message=convert.chat_message(proto.message),
        state=word_of(proto, "state"),
        finish_reason=convert.finish_reason(proto.finish_reason),
        usage=convert.usage(proto.usage),
        model=proto.model,
        adapter_version=proto.adapter_version,
        create_time=proto.create_time.ToDatetime(tzinfo=UTC) if proto.HasField("create_time") else None,
        sequence=proto.sequence,
    )
