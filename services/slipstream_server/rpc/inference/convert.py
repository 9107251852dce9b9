"""Generation between protobuf and the domain: GenerateRequest in, events out.

Only what protobuf alone can tell is judged here (an unset oneof, an unset role); ranges are judged where the model is
known, by ``inference/resolve.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import chat_message_pb2, generation_pb2, usage_pb2
from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.inference.calls import (
    BeamChoice,
    ChatMessage,
    ChatPrompt,
    DeltaEvent,
    FinishedEvent,
    GenerateCall,
    GenerateEvent,
    PositionLogprobs,
    Priority,
    Prompt,
    ResponseChoice,
    SamplingChoice,
    StartedEvent,
    StoppingChoice,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)
from slipstream_server.inference.generation import Constraint
from slipstream_server.resource_names import ModelName, check_id
from slipstream_server.rpc.inference.structs import struct_to_dict

MAX_MESSAGES = 4096
MAX_TOOLS = 128

_ROLES = {
    chat_message_pb2.ROLE_SYSTEM: "system",
    chat_message_pb2.ROLE_USER: "user",
    chat_message_pb2.ROLE_ASSISTANT: "assistant",
    chat_message_pb2.ROLE_TOOL: "tool",
}
_PRIORITIES = {
    generation_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    generation_pb2.PRIORITY_LOW: Priority.LOW,
    generation_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    generation_pb2.PRIORITY_HIGH: Priority.HIGH,
}


def generate_call(request: inference_pb2.GenerateRequest, deadline_monotonic_s: float | None) -> GenerateCall:
    """The request as the front takes it. InvalidField or UnsupportedField where protobuf alone shows it cannot be."""
    if request.priority not in _PRIORITIES:
        raise InvalidField.of("priority", f"{request.priority} is no value of slipstream.type.v1.Priority")
    return GenerateCall(
        model=model_id(request.model),
        prompt=_generate_prompt(request),
        adapter=request.adapter,
        sampling=sampling_choice(request.sampling),
        stopping=stopping_choice(request.stopping),
        response=_response_choice(request.response),
        beams=_beam_choice(request),
        priority=_PRIORITIES[request.priority],
        deadline_monotonic_s=deadline_monotonic_s,
        constraint=_constraint(request.constraint) if request.HasField("constraint") else None,
    )


def model_id(name: str, field: str = "model") -> str:
    """The id in ``models/{id}`` or a bare id; empty stays empty (the default model)."""
    if not name:
        return ""
    return ModelName.parse(name, field).model if name.startswith("models/") else check_id(name, field)


def _generate_prompt(request: inference_pb2.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind != "text" and request.HasField("add_special_tokens"):
        raise InvalidField.of("add_special_tokens", "is for text prompts only")
    if kind == "token_ids":
        return TokenPrompt(token_ids=tuple(request.token_ids.ids))
    return _text_or_chat(request, kind)


def count_prompt(request: inference_pb2.CountTokensRequest) -> Prompt:
    """What to count."""
    return _text_or_chat(request, request.WhichOneof("prompt"))


def _text_or_chat(
    request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest, kind: str | None
) -> TextPrompt | ChatPrompt:
    match kind:
        case "text":
            return TextPrompt(text=request.text, add_special_tokens=_or(request, "add_special_tokens", True))
        case "chat":
            return _chat_prompt(request.chat)
        case _:
            raise InvalidField.of("prompt", "is not set; give one of text, token_ids and chat")


def _chat_prompt(chat: inference_pb2.ChatPrompt) -> ChatPrompt:
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise InvalidField.of("chat.messages", f"has {len(chat.messages)} messages; 1 to {MAX_MESSAGES} are allowed")
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidField.of("chat.tools", f"has {len(chat.tools)} tools; at most {MAX_TOOLS} are allowed")
    return ChatPrompt(
        messages=tuple(_chat_message(f"chat.messages[{i}]", message) for i, message in enumerate(chat.messages)),
        tools=tuple(_tool(f"chat.tools[{i}]", tool) for i, tool in enumerate(chat.tools)),
        template_parameters=struct_to_dict(chat.template_parameters, "chat.template_parameters"),
        continue_final_message=chat.continue_final_message,
    )


def _chat_message(field: str, message: chat_message_pb2.ChatMessage) -> ChatMessage:
    role = _ROLES.get(message.role)
    if role is None:
        found = f"{message.role} is no role" if message.role else "is not set"
        raise InvalidField.of(f"{field}.role", f"{found}; one of ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL")
    if message.tool_calls and role != "assistant":
        raise InvalidField.of(f"{field}.tool_calls", f"is for ROLE_ASSISTANT only, not for {role}")
    return ChatMessage(
        role=role,
        content=_content(field, message, required=role in ("user", "tool")),
        name=message.name or None,
        tool_call_id=message.tool_call_id or None,
        tool_calls=tuple(_tool_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)),
    )


def _content(field: str, message: chat_message_pb2.ChatMessage, *, required: bool) -> str:
    if message.content and message.parts:
        raise InvalidField.of(f"{field}.parts", "content and parts are both set; set one of them")
    for i, part in enumerate(message.parts):
        kind = part.WhichOneof("part")
        if kind is None:
            raise InvalidField.of(f"{field}.parts[{i}]", "is empty; set text, image or audio")
        if kind != "text":
            raise UnsupportedField.of(f"{field}.parts[{i}].{kind}", f"the model takes text only, no {kind}")
    content = message.content or "".join(part.text for part in message.parts)
    if required and not content:
        raise InvalidField.of(f"{field}.content", "is empty; a user's or tool's message needs text")
    return content


def _tool_call(field: str, call: chat_message_pb2.ToolCall) -> Mapping[str, Any]:
    function = {"name": call.name, "arguments": struct_to_dict(call.arguments, f"{field}.arguments")}
    return {"id": call.id, "type": "function", "function": function}


def _tool(field: str, tool: chat_message_pb2.Tool) -> Mapping[str, Any]:
    parameters = struct_to_dict(tool.parameters, f"{field}.parameters")
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def sampling_choice(sampling: generation_pb2.SamplingOptions) -> SamplingChoice:
    """``sampling`` with unset fields as None."""
    scalars = {
        field.name: getattr(sampling, field.name) for field, _ in sampling.ListFields() if field.name != "logit_bias"
    }
    return SamplingChoice(**scalars, logit_bias=dict(sampling.logit_bias))


def stopping_choice(stopping: generation_pb2.StoppingOptions) -> StoppingChoice:
    """``stopping`` with unset fields as None."""
    return StoppingChoice(
        max_new_tokens=_or(stopping, "max_new_tokens", None),
        min_new_tokens=_or(stopping, "min_new_tokens", None),
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
    )


def _response_choice(response: generation_pb2.ResponseOptions) -> ResponseChoice:
    return ResponseChoice(
        num_return_sequences=_or(response, "num_return_sequences", None),
        logprobs=_or(response, "logprobs", None),
        prompt_logprobs=_or(response, "prompt_logprobs", None),
        echo=response.echo,
        skip_special_tokens=_or(response, "skip_special_tokens", True),
        include_stop=response.include_stop,
    )


def _beam_choice(request: inference_pb2.GenerateRequest) -> BeamChoice:
    return BeamChoice(
        num_beams=_or(request, "num_beams", None),
        length_penalty=_or(request.beam, "length_penalty", None),
        early_stopping=_or(request.beam, "early_stopping", None),
    )


def _constraint(constraint: generation_pb2.Constraint) -> Constraint:
    match constraint.WhichOneof("kind"):
        case "choice":
            return Constraint(kind="choice", choices=tuple(constraint.choice.choices))
        case "json_schema":
            return Constraint(kind="json_schema", text=constraint.json_schema)
        case "regex":
            return Constraint(kind="regex", text=constraint.regex)
        case "grammar":
            return Constraint(kind="grammar", text=constraint.grammar)
        case _:
            raise InvalidField.of("constraint", "is empty; set one of json_schema, regex, choice and grammar")


def _or(message: Message, field: str, default: Any) -> Any:
    return getattr(message, field) if message.HasField(field) else default


def stream_response(event: GenerateEvent) -> inference_pb2.StreamGenerateResponse:
    """One event as StreamGenerate sends it."""
    match event:
        case StartedEvent():
            started = inference_pb2.GenerationStarted(
                model=str(ModelName(event.model)), adapter_version=event.adapter_version
            )
            return inference_pb2.StreamGenerateResponse(started=started)
        case DeltaEvent():
            return inference_pb2.StreamGenerateResponse(delta=_delta(event))
        case FinishedEvent():
            return inference_pb2.StreamGenerateResponse(finished=_finished(event))


def _delta(event: DeltaEvent) -> inference_pb2.GenerationDelta:
    return inference_pb2.GenerationDelta(
        index=event.index,
        text=event.text,
        token_ids=event.token_ids,
        finish_reason=finish_reason(event.finish_reason),
        logprobs=[position_logprobs(position) for position in event.logprobs],
        matched_stop=event.matched_stop,
    )


def _finished(event: FinishedEvent) -> inference_pb2.GenerationFinished:
    return inference_pb2.GenerationFinished(
        usage=usage(event),
        completions=[
            inference_pb2.Completion(index=index, finish_reason=finish_reason(reason), matched_stop=matched_stop)
            for index, (reason, matched_stop) in enumerate(zip(event.finish_reasons, event.matched_stops, strict=True))
        ],
        prompt_logprobs=[position_logprobs(position) for position in event.prompt_logprobs],
    )


def finish_reason(reason: str | None) -> usage_pb2.FinishReason.ValueType:
    """``eos_token`` as FINISH_REASON_EOS_TOKEN, and so on; None is unspecified."""
    return usage_pb2.FinishReason.Value(f"FINISH_REASON_{(reason or 'unspecified').upper()}")


def usage(event: FinishedEvent) -> usage_pb2.Usage:
    """What the request cost."""
    return usage_pb2.Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        cached_prompt_tokens=event.cached_prompt_tokens,
    )


def position_logprobs(position: PositionLogprobs) -> generation_pb2.PositionLogprobs:
    """Log-probabilities at one position."""
    chosen = None if position.chosen is None else _token_logprob(position.chosen)
    return generation_pb2.PositionLogprobs(chosen=chosen, top=[_token_logprob(token) for token in position.top])


def _token_logprob(token: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(token_id=token.token_id, token=token.token, logprob=token.logprob)


def generate_response(events: Iterable[GenerateEvent]) -> inference_pb2.GenerateResponse:
    """All events of a completed stream as one answer."""
    response = inference_pb2.GenerateResponse()
    completions: dict[int, inference_pb2.Completion] = {}
    texts: dict[int, list[str]] = {}
    for event in events:
        match event:
            case StartedEvent():
                response.model = str(ModelName(event.model))
                response.adapter_version = event.adapter_version
            case DeltaEvent():
                completion = completions.setdefault(event.index, inference_pb2.Completion(index=event.index))
                texts.setdefault(event.index, []).append(event.text)
                completion.token_ids.extend(event.token_ids)
                completion.logprobs.extend(position_logprobs(position) for position in event.logprobs)
                if event.finish_reason is not None:
                    completion.finish_reason = finish_reason(event.finish_reason)
                    completion.matched_stop = event.matched_stop
            case FinishedEvent():
                response.usage.CopyFrom(usage(event))
                response.prompt_logprobs.extend(position_logprobs(position) for position in event.prompt_logprobs)
    for index, completion in sorted(completions.items()):
        completion.text = "".join(texts[index])
        response.completions.append(completion)
    return response
