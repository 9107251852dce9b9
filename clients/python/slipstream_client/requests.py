"""Keyword arguments to protobuf requests.

What is unset stays unset on the wire; what cannot be sent is refused by name, never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf import struct_pb2
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message as ProtoMessage

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import chat_message_pb2, generation_pb2
from slipstream_client import options as names
from slipstream_client.errors import InvalidRequestError
from slipstream_client.results import ChatMessage, ContentPart, Tool, ToolCall

Proto = TypeVar("Proto", bound=ProtoMessage)

PRIORITIES = {
    "low": generation_pb2.PRIORITY_LOW,
    "normal": generation_pb2.PRIORITY_NORMAL,
    "high": generation_pb2.PRIORITY_HIGH,
}
ROLES = {
    "system": chat_message_pb2.ROLE_SYSTEM,
    "user": chat_message_pb2.ROLE_USER,
    "assistant": chat_message_pb2.ROLE_ASSISTANT,
    "tool": chat_message_pb2.ROLE_TOOL,
}
MESSAGE_FIELDS = frozenset(ChatMessage.__dataclass_fields__)


class Arguments:
    """The keyword arguments of ``call`` while they become a request: each is taken once, and none is dropped."""

    def __init__(self, call: str, allowed: Iterable[str], given: Mapping[str, Any]) -> None:
        if unknown := set(given) - set(allowed):
            raise TypeError(f"{call}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        self._left = {name: value for name, value in given.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The argument of that name, ``default`` where it is unset."""
        return self._left.pop(name, default)

    def into(self, path: str, kind: type[Proto], fields: Iterable[str], **more: Any) -> Proto | None:
        """A message of ``kind`` with those arguments, and ``more``, as its fields; None where none is set."""
        values = {name: value for name in fields if (value := self.take(name)) is not None} | more
        return filled(kind, path, values) if values else None

    def finish(self) -> None:
        """Refuse the arguments that nobody took: they mean nothing for this kind of prompt."""
        for name in self._left:
            raise InvalidRequestError.of(name, "only for a prompt of messages")


def filled(kind: type[Proto], path: str, values: Mapping[str, Any]) -> Proto:
    """A message of ``kind`` with ``values``; a value that does not fit its field is refused by name."""
    message = kind()
    for name, value in values.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            field = f"{path}.{name}" if path else name
            raise InvalidRequestError.of(field, f"{value!r} does not fit: {error}") from error
    return message


def generate_request(prompt: names.Prompt, given: Mapping[str, Any], *, call: str) -> inference_pb2.GenerateRequest:
    """The request of ``generate`` and ``stream_generate``."""
    arguments = Arguments(call, names.GenerateOptions.__annotations__, given)
    request = inference_pb2.GenerateRequest(
        model=arguments.take("model", ""),
        adapter=arguments.take("adapter", ""),
        sampling=_sampling(arguments),
        stopping=_stopping(arguments),
        response=arguments.into(
            "response", generation_pb2.ResponseOptions, [*names.ResponseOptions.__annotations__, "logprobs"]
        ),
        beam=arguments.into("beam", generation_pb2.BeamOptions, names.BeamOptions.__annotations__),
        priority=_priority(arguments),
        constraint=_constraint(arguments),
    )
    request.MergeFrom(
        arguments.into("", inference_pb2.GenerateRequest, ["num_beams", "add_special_tokens"])
        or inference_pb2.GenerateRequest()
    )
    if isinstance(prompt, str):
        request.text = checked_text("text", prompt)
    elif is_token_ids(prompt):
        request.token_ids.CopyFrom(filled(inference_pb2.TokenIds, "token_ids", {"ids": prompt}))
    else:
        request.chat.CopyFrom(_chat_prompt(prompt, arguments))
    arguments.finish()
    return request


def complete_request(
    messages: Sequence[names.Message], given: Mapping[str, Any], *, call: str
) -> chat_pb2.CompleteRequest:
    """The request of ``complete`` and ``stream_complete``."""
    arguments = Arguments(call, names.CompleteOptions.__annotations__, given)
    request = chat_pb2.CompleteRequest(
        model=arguments.take("model", ""),
        adapter=arguments.take("adapter", ""),
        messages=messages_to_proto(messages),
        options=generation_options(arguments),
    )
    arguments.finish()
    return request


def generation_options(arguments: Arguments) -> chat_pb2.GenerationOptions:
    """How a chat answer is made."""
    options = chat_pb2.GenerationOptions(
        sampling=_sampling(arguments),
        stopping=_stopping(arguments),
        priority=_priority(arguments),
        constraint=_constraint(arguments),
        tools=[tool_to_proto(tool) for tool in arguments.take("tools", ())],
        template_parameters=_struct("template_parameters", arguments.take("template_parameters")),
    )
    options.MergeFrom(
        arguments.into("options", chat_pb2.GenerationOptions, ["logprobs"]) or chat_pb2.GenerationOptions()
    )
    return options


def count_tokens_request(
    prompt: str | Sequence[names.Message], given: Mapping[str, Any]
) -> inference_pb2.CountTokensRequest:
    """The request of ``count_tokens``."""
    arguments = Arguments("count_tokens", names.CountOptions.__annotations__, given)
    request = inference_pb2.CountTokensRequest(model=arguments.take("model", ""))
    if (add_special_tokens := arguments.take("add_special_tokens")) is not None:
        request.add_special_tokens = add_special_tokens
    if isinstance(prompt, str):
        request.text = checked_text("text", prompt)
    else:
        request.chat.CopyFrom(_chat_prompt(prompt, arguments))
    arguments.finish()
    return request


def is_token_ids(prompt: Sequence[Any]) -> bool:
    """Whether a prompt that is no text is token ids; an empty one counts as such, and the server says what is wrong
    with it.
    """
    return all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)


def checked_text(name: str, text: str) -> str:
    """``text``, unless it cannot be sent as UTF-8 (it came from bytes that were no text)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError.of(
            name, f"character {error.start} is half of a surrogate pair, which is no text"
        ) from error
    return text


def messages_to_proto(messages: Sequence[names.Message]) -> list[chat_message_pb2.ChatMessage]:
    """Messages, oldest first; errors name the place in the list."""
    return [message_to_proto(message, f"messages[{place}]") for place, message in enumerate(messages)]


def message_to_proto(message: names.Message, path: str) -> chat_message_pb2.ChatMessage:
    """One message."""
    known = message if isinstance(message, ChatMessage) else _message_from(message, path)
    if known.role not in ROLES:
        raise InvalidRequestError.of(f"{path}.role", f"{known.role!r} is not one of {', '.join(ROLES)}")
    values = {
        "content": checked_text(f"{path}.content", known.content),
        "name": known.name,
        "tool_call_id": known.tool_call_id,
    }
    proto = filled(chat_message_pb2.ChatMessage, path, {name: value for name, value in values.items() if value})
    proto.role = ROLES[known.role]
    proto.parts.extend(_part_to_proto(part, f"{path}.parts[{place}]") for place, part in enumerate(known.parts))
    proto.tool_calls.extend(_tool_call_to_proto(call) for call in known.tool_calls)
    return proto


def _message_from(message: Mapping[str, Any], path: str) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise InvalidRequestError.of(path, f"{message!r} is neither a ChatMessage nor a mapping with role and content")
    if unknown := set(message) - MESSAGE_FIELDS:
        raise InvalidRequestError.of(f"{path}.{sorted(unknown)[0]}", f"not one of {', '.join(sorted(MESSAGE_FIELDS))}")
    known = {name: value for name, value in message.items() if value is not None}
    content = known.get("content", "")
    if not isinstance(content, str):
        raise InvalidRequestError.of(f"{path}.content", f"{content!r} is no text; use parts for more than one text")
    parts = tuple(p if isinstance(p, ContentPart) else ContentPart(**p) for p in known.pop("parts", ()))
    calls = tuple(c if isinstance(c, ToolCall) else ToolCall(**c) for c in known.pop("tool_calls", ()))
    return ChatMessage(**({"role": ""} | known), parts=parts, tool_calls=calls)


def _part_to_proto(part: ContentPart, path: str) -> chat_message_pb2.ContentPart:
    values = {name: value for name in ("text", "image", "audio") if (value := getattr(part, name)) is not None}
    if len(values) != 1:
        raise InvalidRequestError.of(path, f"needs exactly one of text, image and audio, has {len(values)}")
    return filled(chat_message_pb2.ContentPart, path, values)


def _tool_call_to_proto(call: ToolCall) -> chat_message_pb2.ToolCall:
    return chat_message_pb2.ToolCall(id=call.id, name=call.name, arguments=_struct("arguments", call.arguments))


def tool_to_proto(tool: Tool) -> chat_message_pb2.Tool:
    """A tool offered to the model."""
    return chat_message_pb2.Tool(
        name=tool.name, description=tool.description, parameters=_struct("tools.parameters", tool.parameters)
    )


def _chat_prompt(messages: Any, arguments: Arguments) -> inference_pb2.ChatPrompt:
    return inference_pb2.ChatPrompt(
        messages=messages_to_proto(messages),
        tools=[tool_to_proto(tool) for tool in arguments.take("tools", ())],
        template_parameters=_struct("template_parameters", arguments.take("template_parameters")),
        continue_final_message=arguments.take("continue_final_message", False),
    )


def _sampling(arguments: Arguments) -> generation_pb2.SamplingOptions | None:
    return arguments.into("sampling", generation_pb2.SamplingOptions, names.SamplingOptions.__annotations__)


def _stopping(arguments: Arguments) -> generation_pb2.StoppingOptions | None:
    stop = arguments.take("stop")
    strings = {} if stop is None else {"stop": [stop] if isinstance(stop, str) else list(stop)}
    return arguments.into("stopping", generation_pb2.StoppingOptions, names.StoppingOptions.__annotations__, **strings)


def _priority(arguments: Arguments) -> generation_pb2.Priority.ValueType:
    name = arguments.take("priority")
    if name is not None and name not in PRIORITIES:
        raise InvalidRequestError.of("priority", f"{name!r} is not one of {', '.join(PRIORITIES)}")
    return generation_pb2.PRIORITY_UNSPECIFIED if name is None else PRIORITIES[name]


def _constraint(arguments: Arguments) -> generation_pb2.Constraint | None:
    given = {name: v for name in names.ConstraintOptions.__annotations__ if (v := arguments.take(name)) is not None}
    if len(given) > 1:
        raise InvalidRequestError.of("constraint", f"{' and '.join(given)} exclude each other")
    if "choices" in given:
        return generation_pb2.Constraint(
            choice=filled(generation_pb2.ChoiceConstraint, "constraint.choice", {"choices": list(given["choices"])})
        )
    if isinstance(given.get("json_schema"), Mapping):
        given["json_schema"] = json.dumps(given["json_schema"])
    return filled(generation_pb2.Constraint, "constraint", given) if given else None


def _struct(name: str, values: Mapping[str, Any] | None) -> struct_pb2.Struct | None:
    if values is None:
        return None
    try:
        return ParseDict(dict(values), struct_pb2.Struct())
    except ParseError as error:
        raise InvalidRequestError.of(name, f"{values!r} is not made of JSON values") from error
