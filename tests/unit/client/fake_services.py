"""Real grpc.aio services on port 0 that do what a test tells them to, and remember what they were asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.chat.v1 import chat_service_pb2_grpc
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc, model_service_pb2_grpc
from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream.type.v1 import chat_message_pb2, usage_pb2
from slipstream_client.retries import RetryPolicy
from slipstream_client.settings import SERVICES, ClientSettings

MODEL = "models/tiny"


def settings_for(address: str, **more: Any) -> ClientSettings:
    """Settings of a client whose services all are at ``address``, and whose retries are quick."""
    quick = RetryPolicy(max_attempts=3, initial_backoff_s=0.01, max_backoff_s=0.02)
    return ClientSettings(addresses=dict.fromkeys(SERVICES, address), **({"retries": quick} | more))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A status with google.rpc details; on a stream it comes after ``after_deltas`` deltas."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "told to fail"
    retry_after_s: float | None = None
    violations: Sequence[tuple[str, str]] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    after_deltas: int = 0

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(self.code, self.message, trailing_metadata=(("grpc-status-details-bin", self.packed()),))

    def packed(self) -> bytes:
        details: list[Any] = []
        if self.reason:
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain="slipstream", metadata=self.metadata))
        if self.violations:
            fields = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in self.violations]
            details.append(error_details_pb2.BadRequest(field_violations=fields))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed = [any_pb2.Any() for _ in details]
        for box, detail in zip(packed, details, strict=True):
            box.Pack(detail)
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)
        return status.SerializeToString()


@dataclass(slots=True)
class Seen:
    """One call as it arrived."""

    method: str
    request: Any
    metadata: dict[str, str]
    time_s: float
    time_remaining_s: float


class FakeServices(
    inference_service_pb2_grpc.InferenceServiceServicer,
    chat_service_pb2_grpc.ChatServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
):
    """Answers every prompt with ``words``; ``failures`` are spent first, one for each call."""

    def __init__(self) -> None:
        self.words = ["Hello", " there", "!"]
        self.failures: deque[Failure] = deque()
        self.seen: list[Seen] = []
        self.hang_after_deltas: int | None = None
        self.hang_on: str = ""
        self.cancelled = asyncio.Event()
        self.leave_out_finished = False
        self.models = [model_pb2.Model(name=MODEL, state=model_pb2.Model.STATE_READY, context_tokens=2048)]

    def _note(self, request: Any, context: grpc.aio.ServicerContext[Any, Any], method: str) -> Failure | None:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        now_s = asyncio.get_running_loop().time()
        self.seen.append(Seen(method, request, metadata, now_s, context.time_remaining() or 0.0))
        return self.failures.popleft() if self.failures else None

    async def _unary(self, request: Any, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
        failure = self._note(request, context, method)
        if failure is not None:
            await failure.abort(context)

    async def _words(self, failure: Failure | None, context: Any, prompt: str = "") -> AsyncIterator[str]:
        """The words; a failure or a hang comes after as many of them as was asked for."""
        hang_at = self.hang_after_deltas if not self.hang_on or self.hang_on in prompt else None
        try:
            for place, word in enumerate([*self.words, ""]):
                if failure is not None and place == failure.after_deltas:
                    await failure.abort(context)
                if place == hang_at:
                    await asyncio.Event().wait()
                if word:
                    yield word
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    @property
    def usage(self) -> usage_pb2.Usage:
        return usage_pb2.Usage(prompt_tokens=5, completion_tokens=len(self.words), cached_prompt_tokens=2)

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> inference_pb2.GenerateResponse:
        await self._unary(request, context, "Generate")
        count = request.response.num_return_sequences or 1
        return inference_pb2.GenerateResponse(
            completions=[
                inference_pb2.Completion(
                    index=index,
                    text="".join(self.words),
                    token_ids=[1, 2, 3],
                    finish_reason=usage_pb2.FINISH_REASON_STOP_STRING,
                    matched_stop="!",
                )
                for index in range(count)
            ],
            usage=self.usage,
            model=MODEL,
            adapter_version="adapters/support/versions/v3",
        )

    async def StreamGenerate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        failure = self._note(request, context, "StreamGenerate")
        yield inference_pb2.StreamGenerateResponse(started=inference_pb2.GenerationStarted(model=MODEL))
        async for word in self._words(failure, context, request.text):
            yield inference_pb2.StreamGenerateResponse(delta=inference_pb2.GenerationDelta(text=word, token_ids=[7]))
        if not self.leave_out_finished:
            ended = inference_pb2.Completion(index=0, finish_reason=usage_pb2.FINISH_REASON_LENGTH)
            finished = inference_pb2.GenerationFinished(usage=self.usage, completions=[ended])
            yield inference_pb2.StreamGenerateResponse(finished=finished)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        await self._unary(request, context, "Tokenize")
        tokens = [
            inference_pb2.Token(id=place, token=letter, start=place, end=place + 1)
            for place, letter in enumerate(request.text)
        ]
        return inference_pb2.TokenizeResponse(tokens=tokens, model=MODEL)

    async def Detokenize(self, request: Any, context: Any) -> inference_pb2.DetokenizeResponse:
        await self._unary(request, context, "Detokenize")
        return inference_pb2.DetokenizeResponse(text=" ".join(map(str, request.token_ids)), model=MODEL)

    async def CountTokens(self, request: Any, context: Any) -> inference_pb2.CountTokensResponse:
        await self._unary(request, context, "CountTokens")
        return inference_pb2.CountTokensResponse(prompt_tokens=11, context_tokens=2048, model=MODEL)

    async def Complete(self, request: chat_pb2.CompleteRequest, context: Any) -> chat_pb2.CompleteResponse:
        await self._unary(request, context, "Complete")
        message = chat_message_pb2.ChatMessage(role=chat_message_pb2.ROLE_ASSISTANT, content="".join(self.words))
        return chat_pb2.CompleteResponse(
            message=message, finish_reason=usage_pb2.FINISH_REASON_EOS_TOKEN, usage=self.usage, model=MODEL
        )

    async def StreamComplete(
        self, request: chat_pb2.CompleteRequest, context: Any
    ) -> AsyncIterator[chat_pb2.StreamCompleteResponse]:
        failure = self._note(request, context, "StreamComplete")
        yield chat_pb2.StreamCompleteResponse(started=chat_pb2.CompletionStarted(model=MODEL))
        async for word in self._words(failure, context, request.messages[-1].content):
            yield chat_pb2.StreamCompleteResponse(delta=chat_pb2.MessageDelta(text=word))
        ended = chat_pb2.CompletionFinished(finish_reason=usage_pb2.FINISH_REASON_EOS_TOKEN, usage=self.usage)
        yield chat_pb2.StreamCompleteResponse(finished=ended)

    async def CreateConversation(self, request: Any, context: Any) -> chat_pb2.Conversation:
        await self._unary(request, context, "CreateConversation")
        return chat_pb2.Conversation(name="conversations/c1")

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Any) -> model_pb2.ListModelsResponse:
        """One model a page, whatever the page size."""
        await self._unary(request, context, "ListModels")
        place = int(request.page_token or 0)
        more = str(place + 1) if place + 1 < len(self.models) else ""
        return model_pb2.ListModelsResponse(models=self.models[place : place + 1], next_page_token=more)

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Any) -> model_pb2.Model:
        await self._unary(request, context, "GetModel")
        for model in self.models:
            if request.name.rpartition("/")[2] == model.name.rpartition("/")[2]:
                return model
        failure = Failure(
            code=grpc.StatusCode.NOT_FOUND, reason="MODEL_NOT_FOUND", message=f"name: no model {request.name!r}"
        )
        await failure.abort(context)
        raise AssertionError("abort returned")


@contextlib.asynccontextmanager
async def serving(
    fake: FakeServices, *, credentials: grpc.ServerCredentials | None = None, address: str = "127.0.0.1:0"
) -> AsyncIterator[str]:
    """Serve ``fake`` as every service, with the health protocol; the address."""
    server = grpc.aio.server()
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(fake, server)
    chat_service_pb2_grpc.add_ChatServiceServicer_to_server(fake, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(fake, server)
    checks = health.aio.HealthServicer()
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


class ServerThread:
    """The fake services on an event loop of their own, as a synchronous test needs them."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.fake = self.run(self._make())
        self.context = serving(self.fake)
        self.address = self.run(self.context.__aenter__())
        return self

    def wait_cancelled(self):
        """Wait until a call was cancelled on the server."""
        self.run(asyncio.wait_for(self.fake.cancelled.wait(), 5))

    async def _make(self):
        return FakeServices()

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def __exit__(self, *error):
        self.run(self.context.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
