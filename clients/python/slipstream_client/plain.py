"""Protobuf messages as frozen dataclasses: the dataclass's own fields say what is read, and as what.

An enum becomes its word in lower case (empty where unspecified or newer than this client), a Timestamp a datetime in
UTC, a Duration seconds (in a field named ``..._s``), a Struct or Value plain data, a google.rpc.Status a Failure, what
is unset None. Not known here: any one message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC
from typing import Any, TypeVar, get_args, get_type_hints

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2

Result = TypeVar("Result")
Reader = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why something failed on the server; ``reason`` is one of the contract's error reasons, without its prefix."""

    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.message} ({self.reason})" if self.reason else self.message


def plain(kind: type[Result], proto: Any) -> Result:
    """``proto``, a message, as an object of the dataclass ``kind``."""
    shape: Any = kind
    message: Any = type(proto)
    return kind(**{name: read(proto) for name, read in _readers(shape, message)})


@functools.cache
def _readers(kind: Any, message: Any) -> tuple[tuple[str, Reader], ...]:
    hints = get_type_hints(kind)
    return tuple((f.name, _reader(f.name, hints[f.name], message)) for f in fields(kind))


def _reader(name: str, hint: Any, message: Any) -> Reader:
    known = message.DESCRIPTOR.fields_by_name
    source = name if name in known else name.removesuffix("_s")
    descriptor = known[source]
    convert = _converter(descriptor, hint)
    if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
        return lambda proto: dict(getattr(proto, source))
    if descriptor.is_repeated:
        return lambda proto: tuple(map(convert, getattr(proto, source)))
    if descriptor.has_presence:
        return lambda proto: convert(getattr(proto, source)) if proto.HasField(source) else None
    return lambda proto: convert(getattr(proto, source))


def _converter(descriptor: Any, hint: Any) -> Reader:
    """What makes of one value of the field what the dataclass holds."""
    if descriptor.enum_type is not None:
        return functools.partial(_word, descriptor.enum_type)
    if descriptor.message_type is None:
        return _itself
    if (special := _WELL_KNOWN.get(descriptor.message_type.full_name)) is not None:
        return special
    inner: Any = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
    return mapping_of if inner is None else functools.partial(plain, inner)


def mapping_of(proto: Message) -> dict[str, Any]:
    """The set fields of a message by their names, with the same conversions all the way down."""
    found: dict[str, Any] = {}
    for descriptor, value in proto.ListFields():
        convert = _converter(descriptor, None)
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            found[descriptor.name] = dict(value)
        else:
            found[descriptor.name] = [convert(item) for item in value] if descriptor.is_repeated else convert(value)
    return found


def _itself(value: Any) -> Any:
    return value


def _word(enum: Any, number: int) -> str:
    value = enum.values_by_number.get(number)
    if value is None or number == 0:
        return ""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(value.name).removeprefix(prefix).lower()


def word_of(proto: Message, name: str) -> str:
    """The word of one enum field of ``proto``."""
    return _word(proto.DESCRIPTOR.fields_by_name[name].enum_type, getattr(proto, name))


def failure(status: Any) -> Failure:
    """What a google.rpc.Status says."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            break
    return Failure(message=status.message, reason=info.reason, metadata=dict(info.metadata))


_WELL_KNOWN: Mapping[str, Reader] = {
    "google.protobuf.Timestamp": lambda proto: proto.ToDatetime(tzinfo=UTC),
    "google.protobuf.Duration": lambda proto: proto.seconds + proto.nanos / 1e9,
    "google.protobuf.Struct": MessageToDict,
    "google.protobuf.Value": MessageToDict,
    "google.rpc.Status": failure,
}
