"""Chat in the words of the inference service, and its answers back: protobuf to protobuf.

The chat service judges nothing that the inference service judges better: it passes fields on, and translates the field
names of errors, so that a client reads about the message it sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import chat_message_pb2
from slipstream_server.errors import FieldViolation, InvalidRequest, SlipstreamError

# A field of GenerateRequest -> the field of CompleteRequest that it was made from; prefixes, the longest first.
_CHAT_FIELDS = (
    ("chat.tools", "options.tools"),
    ("chat.template_parameters", "options.template_parameters"),
    ("chat.messages", "messages"),
    ("response.logprobs", "options.logprobs"),
    ("sampling", "options.sampling"),
    ("stopping", "options.stopping"),
    ("priority", "options.priority"),
    ("constraint", "options.constraint"),
)


def generate_request(
    *,
    model: str,
    adapter: str,
    messages: Iterable[chat_message_pb2.ChatMessage],
    options: chat_pb2.GenerationOptions,
) -> inference_pb2.GenerateRequest:
    """The inference request that answers ``messages``. Unset options stay unset."""
    request = inference_pb2.GenerateRequest(model=model, adapter=adapter, priority=options.priority)
    request.chat.messages.extend(messages)
    request.chat.tools.extend(options.tools)
    request.chat.template_parameters.CopyFrom(options.template_parameters)
    request.sampling.CopyFrom(options.sampling)
    request.stopping.CopyFrom(options.stopping)
    if options.HasField("constraint"):
        request.constraint.CopyFrom(options.constraint)
    if options.HasField("logprobs"):
        request.response.logprobs = options.logprobs
    return request


def complete_response(response: inference_pb2.GenerateResponse) -> chat_pb2.CompleteResponse:
    """The only completion as an assistant's message."""
    completion = response.completions[0]
    return chat_pb2.CompleteResponse(
        message=chat_message_pb2.ChatMessage(role=chat_message_pb2.ROLE_ASSISTANT, content=completion.text),
        finish_reason=completion.finish_reason,
        usage=response.usage,
        model=response.model,
        adapter_version=response.adapter_version,
        logprobs=completion.logprobs,
    )


def stream_complete_response(event: inference_pb2.StreamGenerateResponse) -> chat_pb2.StreamCompleteResponse:
    """One event of the inference service as StreamComplete sends it."""
    match event.WhichOneof("event"):
        case "started":
            started = event.started
            return chat_pb2.StreamCompleteResponse(
                started=chat_pb2.CompletionStarted(model=started.model, adapter_version=started.adapter_version)
            )
        case "delta":
            return chat_pb2.StreamCompleteResponse(delta=message_delta(event.delta))
        case _:
            finished = event.finished
            return chat_pb2.StreamCompleteResponse(
                finished=chat_pb2.CompletionFinished(
                    finish_reason=finished.completions[0].finish_reason, usage=finished.usage
                )
            )


def message_delta(delta: inference_pb2.GenerationDelta) -> chat_pb2.MessageDelta:
    """New text of the answer."""
    return chat_pb2.MessageDelta(text=delta.text, logprobs=delta.logprobs)


def in_chat_words(error: SlipstreamError) -> SlipstreamError:
    """The error with the field names of CompleteRequest; errors that name no field are returned as they are."""
    return _renamed(error, _CHAT_FIELDS)


def in_turn_words(error: SlipstreamError, *, num_messages: int, has_system: bool) -> SlipstreamError:
    """An error in chat words with the fields that a turn's ``num_messages`` messages were made from."""
    first = [("messages[0].content", "conversation.system_message")] if has_system else []
    last = (f"messages[{num_messages - 1}]", "message")
    others = (("messages", "message"), ("model", "conversation.model"), ("adapter", "conversation.adapter"))
    return _renamed(error, (*first, last, *others))


def _renamed(error: SlipstreamError, names: Sequence[tuple[str, str]]) -> SlipstreamError:
    if not isinstance(error, InvalidRequest) or not error.violations:
        return error
    violations = [FieldViolation(_new_name(v.field, names), v.description) for v in error.violations]
    message = error.message
    for before, after in zip(error.violations, violations, strict=True):
        message = message.replace(before.field, after.field, 1)
    return type(error)(message, violations=violations, metadata=error.metadata, retry_after_s=error.retry_after_s)


def _new_name(field: str, names: Sequence[tuple[str, str]]) -> str:
    for prefix, new_prefix in names:
        if field == prefix or field.startswith((f"{prefix}.", f"{prefix}[")):
            return new_prefix + field.removeprefix(prefix)
    return field
