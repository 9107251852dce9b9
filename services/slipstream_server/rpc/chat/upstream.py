"""The inference service as the chat service sees it: generation over gRPC, with the caller's deadline and cancellation.

Deadline and request id travel with every call (``rpc/channels.py``). Errors arrive as the classes they were raised as,
in the words of the chat contract. Lives on the event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream_server.rpc.chat.convert import in_chat_words
from slipstream_server.rpc.status import error_of_status


class InferenceUpstream:
    """Calls of one inference service over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: inference_grpc.InferenceServiceAsyncStub = inference_grpc.InferenceServiceStub(channel)

    async def generate(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        """The whole answer. Cancelling the caller cancels the call."""
        try:
            return await self._stub.Generate(request)
        except grpc.aio.AioRpcError as rpc_error:
            raise in_chat_words(error_of_status(rpc_error)) from None

    async def stream(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncGenerator[inference_pb2.StreamGenerateResponse, None]:
        """The answer as it comes; the call is cancelled when the iteration ends, however it ends."""
        call = self._stub.StreamGenerate(request)
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as rpc_error:
            raise in_chat_words(error_of_status(rpc_error)) from None
        finally:
            call.cancel()
