"""Protobuf answers to results."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.json_format import MessageToDict

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import chat_message_pb2, generation_pb2, usage_pb2
from slipstream_client import results
from slipstream_client.results import FinishReason

ROLE_NAMES = {
    chat_message_pb2.ROLE_SYSTEM: "system",
    chat_message_pb2.ROLE_USER: "user",
    chat_message_pb2.ROLE_ASSISTANT: "assistant",
    chat_message_pb2.ROLE_TOOL: "tool",
}
FINISH_REASONS = {
    usage_pb2.FINISH_REASON_EOS_TOKEN: FinishReason.EOS_TOKEN,
    usage_pb2.FINISH_REASON_STOP_TOKEN: FinishReason.STOP_TOKEN,
    usage_pb2.FINISH_REASON_STOP_STRING: FinishReason.STOP_STRING,
    usage_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    usage_pb2.FINISH_REASON_INCOMPLETE: FinishReason.INCOMPLETE,
}


def finish_reason(value: usage_pb2.FinishReason.ValueType) -> FinishReason:
    return FINISH_REASONS.get(value, FinishReason.UNSPECIFIED)


def usage(proto: usage_pb2.Usage) -> results.Usage:
    return results.Usage(
        prompt_tokens=proto.prompt_tokens,
        completion_tokens=proto.completion_tokens,
        cached_prompt_tokens=proto.cached_prompt_tokens,
    )


def _logprob(proto: generation_pb2.TokenLogprob) -> results.TokenLogprob:
    return results.TokenLogprob(token_id=proto.token_id, token=proto.token, logprob=proto.logprob)


def logprobs(protos: Iterable[generation_pb2.PositionLogprobs]) -> tuple[results.PositionLogprobs, ...]:
    return tuple(
        results.PositionLogprobs(
            chosen=_logprob(proto.chosen) if proto.HasField("chosen") else None, top=tuple(map(_logprob, proto.top))
        )
        for proto in protos
    )


def completion(proto: inference_pb2.Completion) -> results.Completion:
    return results.Completion(
        index=proto.index,
        text=proto.text,
        token_ids=tuple(proto.token_ids),
        finish_reason=finish_reason(proto.finish_reason),
        matched_stop=proto.matched_stop,
        logprobs=logprobs(proto.logprobs),
    )


def generation(proto: inference_pb2.GenerateResponse) -> results.Generation:
    return results.Generation(
        completions=tuple(map(completion, proto.completions)),
        usage=usage(proto.usage),
        model=proto.model,
        adapter_version=proto.adapter_version,
        prompt_logprobs=logprobs(proto.prompt_logprobs),
    )


def generation_delta(proto: inference_pb2.GenerationDelta) -> results.GenerationDelta:
    return results.GenerationDelta(
        index=proto.index,
        text=proto.text,
        token_ids=tuple(proto.token_ids),
        finish_reason=finish_reason(proto.finish_reason),
        matched_stop=proto.matched_stop,
        logprobs=logprobs(proto.logprobs),
    )


def chat_message(proto: chat_message_pb2.ChatMessage) -> results.ChatMessage:
    return results.ChatMessage(
        role=ROLE_NAMES.get(proto.role, ""),
        content=proto.content,
        parts=tuple(map(_part, proto.parts)),
        name=proto.name,
        tool_calls=tuple(map(_tool_call, proto.tool_calls)),
        tool_call_id=proto.tool_call_id,
    )


def _part(proto: chat_message_pb2.ContentPart) -> results.ContentPart:
    kind = proto.WhichOneof("part")
    if kind == "image":
        return results.ContentPart(image=proto.image)
    if kind == "audio":
        return results.ContentPart(audio=proto.audio)
    return results.ContentPart(text=proto.text)


def _tool_call(proto: chat_message_pb2.ToolCall) -> results.ToolCall:
    return results.ToolCall(id=proto.id, name=proto.name, arguments=MessageToDict(proto.arguments))


def chat_completion(proto: chat_pb2.CompleteResponse) -> results.ChatCompletion:
    return results.ChatCompletion(
        message=chat_message(proto.message),
        finish_reason=finish_reason(proto.finish_reason),
        usage=usage(proto.usage),
        model=proto.model,
        adapter_version=proto.adapter_version,
        logprobs=logprobs(proto.logprobs),
    )


def chat_delta(proto: chat_pb2.MessageDelta) -> results.ChatDelta:
    return results.ChatDelta(text=proto.text, logprobs=logprobs(proto.logprobs))


def tokenization(proto: inference_pb2.TokenizeResponse) -> results.Tokenization:
    tokens = (results.Token(id=t.id, token=t.token, start=t.start, end=t.end) for t in proto.tokens)
    return results.Tokenization(tokens=tuple(tokens), model=proto.model)


def token_count(proto: inference_pb2.CountTokensResponse) -> results.TokenCount:
    return results.TokenCount(prompt_tokens=proto.prompt_tokens, context_tokens=proto.context_tokens, model=proto.model)
