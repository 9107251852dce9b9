"""JSON values of requests (google.protobuf.Struct and Value) as plain Python. Pure functions; any thread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2

from slipstream_server.errors import InvalidField


def struct_to_dict(struct: struct_pb2.Struct, field: str) -> dict[str, Any]:
    """A Struct; whole numbers become int, as a template or a schema expects them. Raises InvalidField for a number that
    is not finite: protobuf lets it through, JSON has none.
    """
    fields: Mapping[str, struct_pb2.Value] = struct.fields
    return {key: value_to_plain(value, f"{field}.{key[:80]}") for key, value in fields.items()}


def value_to_plain(value: struct_pb2.Value, field: str) -> Any:
    """A Value, as ``struct_to_dict`` reads it; one without a kind is None."""
    match value.WhichOneof("kind"):
        case "struct_value":
            return struct_to_dict(value.struct_value, field)
        case "list_value":
            return [value_to_plain(item, f"{field}[{place}]") for place, item in enumerate(value.list_value.values)]
        case "number_value":
            return _number(value.number_value, field)
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case _:
            return None


def _number(number: float, field: str) -> int | float:
    if not math.isfinite(number):
        raise InvalidField.of(field, f"{number} is no finite number")
    return int(number) if number.is_integer() else number
