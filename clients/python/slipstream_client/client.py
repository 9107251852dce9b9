"""The asynchronous client: one object for all services.

It belongs to the event loop that first uses it; on other threads use the facade.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from slipstream.chat.v1 import chat_service_pb2_grpc
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc
from slipstream_client import convert, health, requests, streams
from slipstream_client.adapters import Adapters
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.conversations import Conversations
from slipstream_client.datasets import Datasets
from slipstream_client.jobs import Jobs
from slipstream_client.models import Models
from slipstream_client.options import (
    CallOptions,
    CompleteOptions,
    CountOptions,
    GenerateOptions,
    Message,
    Prompt,
)
from slipstream_client.results import (
    ChatCompletion,
    ChatDelta,
    Detokenization,
    Generation,
    GenerationDelta,
    ServiceHealth,
    TokenCount,
    Tokenization,
)
from slipstream_client.retries import RetryPolicy
from slipstream_client.settings import SERVICES, ClientSettings
from slipstream_client.task_results import TaskAnswer, TaskResult
from slipstream_client.tasks import Tasks


class SlipstreamClient:
    """A client of the Slipstream services.

    What is not given comes from the environment (SLIPSTREAM_ADDRESS, SLIPSTREAM_TOKEN, ...: see ``settings``), then
    from the defaults of one machine. Calls raise SlipstreamClientError; ``timeout_s`` bounds a call with all its
    retries. Use it with ``async with``, or ``close`` it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        inference_address: str | None = None,
        chat_address: str | None = None,
        training_address: str | None = None,
        adapters_address: str | None = None,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: bool | None = None,
        ca_cert: str | Path | None = None,
        client_cert: str | Path | None = None,
        client_key: str | Path | None = None,
        timeout_s: float | None = None,
        retries: RetryPolicy | None = None,
        settings: ClientSettings | None = None,
    ) -> None:
        self.settings = settings or ClientSettings.resolve(
            address=address,
            inference_address=inference_address,
            chat_address=chat_address,
            training_address=training_address,
            adapters_address=adapters_address,
            token=token,
            token_file=token_file,
            tls=tls,
            ca_cert=ca_cert,
            client_cert=client_cert,
            client_key=client_key,
            timeout_s=timeout_s,
            retries=retries,
        )
        self.connection = Connection(self.settings)
        self.models = Models(self.connection)
        self.datasets = Datasets(self.connection)
        self.jobs = Jobs(self.connection)
        self.adapters = Adapters(self.connection)
        self.conversations = Conversations(self.connection)
        self.tasks = Tasks(self.connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls still running are cancelled."""
        await self.connection.close()

    @property
    def inference_stub(self) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        """The raw stub of InferenceService; ``models.stub`` is that of ModelService."""
        return inference_service_pb2_grpc.InferenceServiceStub(self.connection.channel("inference"))

    @property
    def chat_stub(self) -> chat_service_pb2_grpc.ChatServiceAsyncStub:
        """The raw stub of ChatService."""
        return chat_service_pb2_grpc.ChatServiceStub(self.connection.channel("chat"))

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Complete a prompt: text, token ids, or messages."""
        call, rest = _split(options)
        request = requests.generate_request(prompt, rest, call="generate")
        return convert.generation(
            await self.connection.unary("inference", self.inference_stub.Generate, request, **call)
        )

    def stream_generate(
        self, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> streams.AnswerStream[GenerationDelta]:
        """Complete a prompt and get the text as it comes.

        The call begins with the first iteration, and is retried until the first delta.
        """
        call, rest = _split(options)
        request = requests.generate_request(prompt, rest, call="stream_generate")
        call["request_id"] = request_id = checked_request_id(call.get("request_id"))
        events = self.connection.stream(
            "inference", self.inference_stub.StreamGenerate, request, is_answer=_is_delta, **call
        )
        return streams.generation_stream(events, request_id)

    async def complete(self, messages: Sequence[Message], **options: Unpack[CompleteOptions]) -> ChatCompletion:
        """Answer a list of messages; nothing is stored."""
        call, rest = _split(options)
        request = requests.complete_request(messages, rest, call="complete")
        return convert.chat_completion(await self.connection.unary("chat", self.chat_stub.Complete, request, **call))

    def stream_complete(
        self, messages: Sequence[Message], **options: Unpack[CompleteOptions]
    ) -> streams.AnswerStream[ChatDelta]:
        """Answer a list of messages and get the text as it comes. Otherwise as ``stream_generate``."""
        call, rest = _split(options)
        request = requests.complete_request(messages, rest, call="stream_complete")
        call["request_id"] = request_id = checked_request_id(call.get("request_id"))
        events = self.connection.stream("chat", self.chat_stub.StreamComplete, request, is_answer=_is_delta, **call)
        return streams.chat_stream(events, request_id)

    async def run_task(self, task: str, inputs: Any, **options: Any) -> TaskAnswer:
        """``tasks.run``: run a task on one input or several."""
        return await self.tasks.run(task, inputs, **options)

    def stream_task(self, task: str, inputs: Any, **options: Any) -> AsyncGenerator[TaskResult]:
        """``tasks.stream``: run a task on any number of inputs; results come as they are ready."""
        return self.tasks.stream(task, inputs, **options)

    async def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool | None = None, **call: Unpack[CallOptions]
    ) -> Tokenization:
        """The tokens of a text."""
        request = inference_pb2.TokenizeRequest(
            model=model, text=requests.checked_text("text", text), add_special_tokens=add_special_tokens
        )
        return convert.tokenization(
            await self.connection.unary("inference", self.inference_stub.Tokenize, request, **call)
        )

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        **call: Unpack[CallOptions],
    ) -> Detokenization:
        """The text of token ids."""
        request = requests.filled(inference_pb2.DetokenizeRequest, "", {"model": model, "token_ids": token_ids})
        if skip_special_tokens is not None:
            request.skip_special_tokens = skip_special_tokens
        answer = await self.connection.unary("inference", self.inference_stub.Detokenize, request, **call)
        return Detokenization(text=answer.text, model=answer.model)

    async def count_tokens(self, prompt: str | Sequence[Message], **options: Unpack[CountOptions]) -> TokenCount:
        """How many tokens ``generate`` would see, the chat template included."""
        call, rest = _split(options)
        request = requests.count_tokens_request(prompt, rest)
        return convert.token_count(
            await self.connection.unary("inference", self.inference_stub.CountTokens, request, **call)
        )

    async def health(self, service: str, *, timeout_s: float = 3.0) -> ServiceHealth:
        """How one of the services ``inference``, ``chat``, ``training``, ``adapters`` is.

        Never raises for a service that is down.
        """
        return await health.check(self.connection, service, timeout_s)

    async def status(self, *, timeout_s: float = 3.0) -> list[ServiceHealth]:
        """How every service is, all asked at once."""
        return list(await asyncio.gather(*(self.health(service, timeout_s=timeout_s) for service in SERVICES)))


def _split(options: Any) -> tuple[CallOptions, dict[str, Any]]:
    """What is about the call, and what goes into the request."""
    rest = dict(options)
    call = CallOptions(timeout_s=rest.pop("timeout_s", None), request_id=rest.pop("request_id", None))
    return call, rest


def _is_delta(event: Any) -> bool:
    return bool(event.HasField("delta"))
