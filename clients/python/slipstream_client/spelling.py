"""Mappings of plain values to protobuf messages, under the contract's own names.

Enums are given as their words ("cosine"), durations in seconds, messages as mappings, bytes as such or in base64, as
JSON has them; None means unset. A name that the message does not have, or a value that does not fit, is refused by its
path.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from slipstream_client.errors import InvalidRequestError
from slipstream_client.requests import filled

Proto = TypeVar("Proto", bound=Message)


def message_of(kind: type[Proto], path: str, values: Mapping[str, Any]) -> Proto:
    """A message of ``kind`` with ``values``; ``path`` is where it stands in the request."""
    known = kind.DESCRIPTOR.fields_by_name
    message = kind()
    for name, value in values.items():
        if value is None:
            continue
        place = f"{path}.{name}" if path else name
        if name not in known:
            raise InvalidRequestError.of(place, f"there is no such field; known: {', '.join(sorted(known))}")
        descriptor = known[name]
        if descriptor.message_type is not None:
            _fill(message, descriptor, place, value)
        elif descriptor.enum_type is not None:
            setattr(message, name, number_of(descriptor.enum_type, place, value))
        else:
            message.MergeFrom(filled(kind, path, {name: _scalar(descriptor, place, value)}))
    return message


def _fill(message: Message, descriptor: Any, path: str, value: Any) -> None:
    """One field of messages: a single one, a list of them, or a mapping to them."""
    field: Any = getattr(message, descriptor.name)
    if not descriptor.is_repeated:
        field.SetInParent()
        field.MergeFrom(_inner(type(field), path, value))
    elif descriptor.message_type.GetOptions().map_entry:
        _fill_map(message, descriptor, path, value)
    elif isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequestError.of(path, f"{value!r} is no list")
    else:
        for place, item in enumerate(value):
            one = field.add()
            one.MergeFrom(_inner(type(one), f"{path}[{place}]", item))


def _fill_map(message: Message, descriptor: Any, path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InvalidRequestError.of(path, f"{value!r} is not a mapping")
    if descriptor.message_type.fields_by_name["value"].message_type is None:
        message.MergeFrom(filled(type(message), path.rpartition(".")[0], {descriptor.name: value}))
        return
    field: Any = getattr(message, descriptor.name)
    for key, item in value.items():
        place = f"{path}.{key}"
        if not isinstance(key, str):
            raise InvalidRequestError.of(place, "is no text")
        field[key].MergeFrom(_inner(type(field[key]), place, item))


def _inner(kind: type[Message], path: str, value: Any) -> Message:
    if isinstance(value, kind):
        return value
    if kind is Duration:
        return _duration(path, value)
    if kind in (struct_pb2.Struct, struct_pb2.Value):
        return plain_data(kind, path, value)
    if not isinstance(value, Mapping):
        raise InvalidRequestError.of(path, f"{value!r} is not a mapping")
    return message_of(kind, path, value)


def plain_data(kind: type[Proto], path: str, value: Any) -> Proto:
    """A Struct or Value of plain values."""
    try:
        return ParseDict(value, kind())
    except (ParseError, ValueError, TypeError) as error:
        raise InvalidRequestError.of(path, f"is no plain data: {error}") from error


def _duration(path: str, value: Any) -> Duration:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise InvalidRequestError.of(path, f"{value!r} is not a number of seconds")
    duration = Duration()
    duration.FromNanoseconds(round(value * 1e9))
    return duration


def _scalar(descriptor: Any, path: str, value: Any) -> Any:
    """A text for a list of texts is a mistake that would be sent as a list of letters; for bytes it is base64."""
    if not isinstance(value, str):
        return value
    if descriptor.is_repeated:
        raise InvalidRequestError.of(path, f"{value!r} is one text; a list is needed")
    if descriptor.type != descriptor.TYPE_BYTES:
        return value
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:
        raise InvalidRequestError.of(path, "is neither bytes nor base64") from None


def number_of(enum: Any, path: str, word: Any) -> Any:
    """The number of an enum's value, given as its word in any case, without the enum's prefix; empty: unspecified."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    words = {value.name.removeprefix(prefix).lower(): value.number for value in enum.values}
    name = str(word).lower().replace("-", "_")
    if name == "":
        return 0
    if name not in words or words[name] == 0:
        allowed = ", ".join(known for known, number in words.items() if number)
        raise InvalidRequestError.of(path, f"{word!r} is not one of {allowed}")
    return words[name]
