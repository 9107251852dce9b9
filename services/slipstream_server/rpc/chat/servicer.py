"""ChatService: stored conversations and stateless completion, over the inference service. Event loop; no torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.chat.v1 import chat_service_pb2_grpc as chat_grpc
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream_server.chat.conversations import Conversations
from slipstream_server.chat.turns import TurnEvent, TurnFinished, Turns
from slipstream_server.errors import MessageNotFound
from slipstream_server.resource_names import ConversationName, MessageName, check_id
from slipstream_server.rpc.chat import conversations as convert
from slipstream_server.rpc.chat.convert import complete_response, generate_request, stream_complete_response
from slipstream_server.rpc.chat.upstream import InferenceUpstream
from slipstream_server.rpc.request_context import caller
from slipstream_server.storage.request_records import RequestKey

Context = grpc.aio.ServicerContext[Any, Any]


class ChatServicer(chat_grpc.ChatServiceServicer):
    """Answers messages and keeps conversations. A conversation belongs to the caller who made it."""

    def __init__(self, inference: InferenceUpstream, conversations: Conversations, turns: Turns) -> None:
        self._inference = inference
        self._conversations = conversations
        self._turns = turns

    async def Complete(self, request: chat_pb2.CompleteRequest, context: Context) -> chat_pb2.CompleteResponse:
        return complete_response(await self._inference.generate(_completion(request)))

    async def StreamComplete(
        self, request: chat_pb2.CompleteRequest, context: Context
    ) -> AsyncIterator[chat_pb2.StreamCompleteResponse]:
        async with aclosing(self._inference.stream(_completion(request))) as events:
            async for event in events:
                yield stream_complete_response(event)

    async def CreateConversation(
        self, request: chat_pb2.CreateConversationRequest, context: Context
    ) -> chat_pb2.Conversation:
        if request.conversation_id:
            check_id(request.conversation_id, "conversation_id")
        conversation = await self._conversations.create(
            caller(),
            convert.settings_of(request.conversation),
            conversation_id=request.conversation_id,
            key=_key("CreateConversation", request.request_id, request),
        )
        return convert.conversation_message(conversation)

    async def GetConversation(
        self, request: chat_pb2.GetConversationRequest, context: Context
    ) -> chat_pb2.Conversation:
        conversation_id = ConversationName.parse(request.name, "name").conversation
        return convert.conversation_message(await self._conversations.get(caller(), conversation_id))

    async def ListConversations(
        self, request: chat_pb2.ListConversationsRequest, context: Context
    ) -> chat_pb2.ListConversationsResponse:
        page = await self._conversations.list(caller(), request.page_size, request.page_token)
        return chat_pb2.ListConversationsResponse(
            conversations=[convert.conversation_message(item) for item in page.items],
            next_page_token=page.next_page_token,
        )

    async def UpdateConversation(
        self, request: chat_pb2.UpdateConversationRequest, context: Context
    ) -> chat_pb2.Conversation:
        conversation_id = ConversationName.parse(request.conversation.name, "conversation.name").conversation
        changes = convert.changes_of(request)
        updated = await self._conversations.update(caller(), conversation_id, changes, request.conversation.etag)
        return convert.conversation_message(updated)

    async def DeleteConversation(self, request: chat_pb2.DeleteConversationRequest, context: Context) -> Empty:
        conversation_id = ConversationName.parse(request.name, "name").conversation
        await self._conversations.delete(caller(), conversation_id, request.etag)
        return Empty()

    async def ListMessages(
        self, request: chat_pb2.ListMessagesRequest, context: Context
    ) -> chat_pb2.ListMessagesResponse:
        conversation_id = ConversationName.parse(request.parent, "parent").conversation
        page = await self._conversations.messages(caller(), conversation_id, request.page_size, request.page_token)
        return chat_pb2.ListMessagesResponse(
            messages=[convert.message_message(row) for row in page.items], next_page_token=page.next_page_token
        )

    async def GetMessage(self, request: chat_pb2.GetMessageRequest, context: Context) -> chat_pb2.Message:
        name = MessageName.parse(request.name, "name")
        if not name.message.isdecimal() or len(name.message) > 18:
            raise MessageNotFound(f"conversation {name.conversation} has no message {name.message!r}")
        return convert.message_message(
            await self._conversations.message(caller(), name.conversation, int(name.message))
        )

    async def SendMessage(self, request: chat_pb2.SendMessageRequest, context: Context) -> chat_pb2.SendMessageResponse:
        async with aclosing(self._turn(request)) as events:
            async for event in events:
                if isinstance(event, TurnFinished):
                    finished = event
        return chat_pb2.SendMessageResponse(
            message=convert.message_message(finished.question), reply=convert.message_message(finished.reply)
        )

    async def StreamMessage(
        self, request: chat_pb2.SendMessageRequest, context: Context
    ) -> AsyncIterator[chat_pb2.StreamMessageResponse]:
        async with aclosing(self._turn(request)) as events:
            async for event in events:
                yield convert.stream_message_response(event)

    def _turn(self, request: chat_pb2.SendMessageRequest) -> AsyncGenerator[TurnEvent, None]:
        return self._turns.run(
            caller(),
            ConversationName.parse(request.parent, "parent").conversation,
            convert.said(request.message),
            convert.answer_with(self._inference.stream, request.options),
            # The two ways to send a turn share its memory: a repeat may come the other way.
            key=_key("SendMessage", request.request_id, request),
        )


def _completion(request: chat_pb2.CompleteRequest) -> inference_pb2.GenerateRequest:
    return generate_request(
        model=request.model, adapter=request.adapter, messages=request.messages, options=request.options
    )


def _key(method: str, request_id: str, request: Message) -> RequestKey | None:
    if not request_id:
        return None
    serialized = request.SerializeToString(deterministic=True)
    return RequestKey.of(owner=caller(), method=method, request_id=request_id, request=serialized)
