"""Stored conversations between protobuf and the domain."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import chat_message_pb2, usage_pb2
from slipstream_server.chat.conversations import CHANGEABLE, Conversation, ConversationSettings
from slipstream_server.chat.tables import MessageRow, MessageState
from slipstream_server.chat.turns import (
    Answer,
    AnswerDelta,
    AnswerEvent,
    AnswerFinished,
    AnswerStarted,
    Said,
    TurnEvent,
    TurnFinished,
    TurnStarted,
)
from slipstream_server.errors import InvalidField, InvalidRequest
from slipstream_server.resource_names import ConversationName, MessageName
from slipstream_server.rpc.chat.convert import generate_request, in_turn_words, message_delta

Stream = Callable[[inference_pb2.GenerateRequest], AsyncGenerator[inference_pb2.StreamGenerateResponse, None]]

_STATES = {
    MessageState.COMPLETE: chat_pb2.Message.STATE_COMPLETE,
    MessageState.GENERATING: chat_pb2.Message.STATE_GENERATING,
    MessageState.INCOMPLETE: chat_pb2.Message.STATE_INCOMPLETE,
}
_SPEAKERS = (chat_message_pb2.ROLE_USER, chat_message_pb2.ROLE_TOOL)


def settings_of(conversation: chat_pb2.Conversation) -> ConversationSettings:
    """What the owner chose; output-only fields are ignored."""
    return ConversationSettings(
        title=conversation.title,
        model=conversation.model,
        adapter=conversation.adapter,
        system_message=conversation.system_message,
        labels=dict(conversation.metadata),
    )


def changes_of(request: chat_pb2.UpdateConversationRequest) -> dict[str, object]:
    """The fields to change and their new values. InvalidField for a path that cannot be changed."""
    for path in request.update_mask.paths:
        if path not in CHANGEABLE:
            raise InvalidField.of("update_mask", f"{path[:80]!r} cannot be changed; allowed: {', '.join(CHANGEABLE)}")
    conversation = request.conversation
    paths = request.update_mask.paths or [name for name in CHANGEABLE if getattr(conversation, name)]
    return {path: dict(conversation.metadata) if path == "metadata" else getattr(conversation, path) for path in paths}


def conversation_message(conversation: Conversation) -> chat_pb2.Conversation:
    """The resource."""
    settings = conversation.settings
    return chat_pb2.Conversation(
        name=str(ConversationName(conversation.id)),
        title=settings.title,
        model=settings.model,
        adapter=settings.adapter,
        system_message=settings.system_message,
        metadata=settings.labels,
        owner=conversation.owner,
        message_count=conversation.num_messages,
        create_time=_timestamp(conversation.create_time),
        update_time=_timestamp(conversation.update_time),
        etag=conversation.etag,
    )


def message_message(row: MessageRow) -> chat_pb2.Message:
    """The resource of a stored message."""
    message = chat_pb2.Message(
        name=str(MessageName(row.conversation, str(row.sequence))),
        message=_chat_message(Said(role=row.role, content=row.content, extra=row.extra)),
        state=_STATES[MessageState(row.state)],
        finish_reason=usage_pb2.FinishReason.Value(f"FINISH_REASON_{(row.finish_reason or 'unspecified').upper()}"),
        model=row.model,
        adapter_version=row.adapter_version,
        create_time=_timestamp(row.create_time),
        sequence=row.sequence,
    )
    if row.prompt_tokens:
        message.usage.prompt_tokens = row.prompt_tokens
        message.usage.completion_tokens = row.completion_tokens
        message.usage.cached_prompt_tokens = row.cached_prompt_tokens
    return message


def said(message: chat_message_pb2.ChatMessage) -> Said:
    """What the client says; text in columns, all else opaque. InvalidField for a message that cannot be a question."""
    if message.role not in _SPEAKERS:
        raise InvalidField.of("message.role", "must be ROLE_USER or ROLE_TOOL")
    if not message.content and not message.parts:
        raise InvalidField.of("message.content", "is empty; say something")
    if "\0" in message.content:
        raise InvalidField.of("message.content", "holds a NUL character")
    extra = chat_message_pb2.ChatMessage()
    extra.CopyFrom(message)
    extra.ClearField("role")
    extra.ClearField("content")
    role = "user" if message.role == chat_message_pb2.ROLE_USER else "tool"
    return Said(role=role, content=message.content, extra=extra.SerializeToString(deterministic=True))


def _chat_message(message: Said) -> chat_message_pb2.ChatMessage:
    restored = chat_message_pb2.ChatMessage.FromString(message.extra)
    restored.role = chat_message_pb2.Role.Value(f"ROLE_{message.role.upper()}")
    restored.content = message.content
    return restored


def answer_with(stream: Stream, options: chat_pb2.GenerationOptions) -> Answer:
    """How a turn is answered: by inference, from the conversation's model, adapter, system message and history."""

    async def answer(conversation: Conversation, history: Sequence[Said]) -> AsyncGenerator[AnswerEvent, None]:
        settings = conversation.settings
        messages = [_chat_message(message) for message in history]
        if settings.system_message:
            system = chat_message_pb2.ChatMessage(role=chat_message_pb2.ROLE_SYSTEM, content=settings.system_message)
            messages.insert(0, system)
        request = generate_request(model=settings.model, adapter=settings.adapter, messages=messages, options=options)
        try:
            async with aclosing(stream(request)) as events:
                async for event in events:
                    yield _answer_event(event)
        except InvalidRequest as error:
            has_system = bool(settings.system_message)
            raise in_turn_words(error, num_messages=len(messages), has_system=has_system) from None

    return answer


def _answer_event(event: inference_pb2.StreamGenerateResponse) -> AnswerEvent:
    match event.WhichOneof("event"):
        case "started":
            return AnswerStarted(model=event.started.model, adapter_version=event.started.adapter_version)
        case "delta":
            payload = message_delta(event.delta).SerializeToString()
            return AnswerDelta(text=event.delta.text, payload=payload)
        case _:
            usage = event.finished.usage
            reason = usage_pb2.FinishReason.Name(event.finished.completions[0].finish_reason)
            return AnswerFinished(
                finish_reason=reason.removeprefix("FINISH_REASON_").lower(),
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_prompt_tokens=usage.cached_prompt_tokens,
            )


def stream_message_response(event: TurnEvent) -> chat_pb2.StreamMessageResponse:
    """One event of a turn as StreamMessage sends it."""
    match event:
        case TurnStarted():
            reply = MessageName(event.question.conversation, str(event.reply_sequence))
            started = chat_pb2.MessageStarted(
                message=message_message(event.question),
                reply=str(reply),
                model=event.model,
                adapter_version=event.adapter_version,
            )
            return chat_pb2.StreamMessageResponse(started=started)
        case AnswerDelta():
            delta = chat_pb2.MessageDelta.FromString(event.payload)
            delta.text = event.text
            return chat_pb2.StreamMessageResponse(delta=delta)
        case TurnFinished():
            finished = chat_pb2.MessageFinished(reply=message_message(event.reply))
            return chat_pb2.StreamMessageResponse(finished=finished)


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
