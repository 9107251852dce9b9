"""InferenceService: generation, tasks and tokenizers over the front. Lives on the event loop; no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream_server.errors import InvalidField
from slipstream_server.inference.calls import FinishedEvent, GenerateEvent
from slipstream_server.inference.front import InferenceFront
from slipstream_server.models.tokenizer import TokenSpan
from slipstream_server.resource_names import ModelName
from slipstream_server.rpc.inference import convert
from slipstream_server.rpc.inference.tasks import TaskMethods
from slipstream_server.rpc.request_context import deadline_monotonic_s

MAX_DETOKENIZE_IDS = 1_048_576

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(TaskMethods):
    """Generates, runs tasks and tokenizes."""

    def __init__(self, front: InferenceFront) -> None:
        self._front = front

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        call = convert.generate_call(request, deadline_monotonic_s(context))
        async with await self._front.open(call) as events:
            found = [event async for event in events]
        if _is_long(found[-1]):
            return await asyncio.to_thread(convert.generate_response, found)
        return convert.generate_response(found)

    async def StreamGenerate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        call = convert.generate_call(request, deadline_monotonic_s(context))
        async with await self._front.open(call) as events:
            async for event in events:
                if _is_long(event):
                    yield await asyncio.to_thread(convert.stream_response, event)
                else:
                    yield convert.stream_response(event)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        model = self._model(request.model)
        add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else True
        spans = await self._front.tokenize(model, request.text, add_special_tokens=add_special_tokens)
        # A text of 1 MiB is a million tokens at most: they are not to be waited for by everybody else.
        return await asyncio.to_thread(_tokenized, spans, str(ModelName(model)))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        if not 1 <= len(request.token_ids) <= MAX_DETOKENIZE_IDS:
            allowed = f"1 to {MAX_DETOKENIZE_IDS} are allowed"
            raise InvalidField.of("token_ids", f"has {len(request.token_ids)} ids; {allowed}")
        model = self._model(request.model)
        skip_special_tokens = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._front.detokenize(model, tuple(request.token_ids), skip_special_tokens=skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text, model=str(ModelName(model)))

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Context
    ) -> inference_pb2.CountTokensResponse:
        model = self._model(request.model)
        return inference_pb2.CountTokensResponse(
            prompt_tokens=await self._front.count_tokens(model, convert.count_prompt(request)),
            context_tokens=self._front.context_tokens(model),
            model=str(ModelName(model)),
        )

    def _model(self, name: str) -> str:
        return self._front.name_of(convert.model_id(name))


def _is_long(event: GenerateEvent) -> bool:
    """Whether others need not wait while it is written out: a prompt's log-probabilities may be many."""
    return isinstance(event, FinishedEvent) and bool(event.prompt_logprobs)


def _tokenized(spans: Iterable[TokenSpan], model: str) -> inference_pb2.TokenizeResponse:
    response = inference_pb2.TokenizeResponse(model=model)
    for span in spans:
        response.tokens.add(id=span.token_id, token=span.token, start=span.start, end=span.end)
    return response
