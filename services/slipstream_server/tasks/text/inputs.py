"""The input as the kind that a task takes. The front has seen to it; a worker does not trust that."""

from __future__ import annotations

from typing import Any, TypeVar

from slipstream_server.errors import InvalidField

Kind = TypeVar("Kind")


def expect(item: Any, kind: type[Kind]) -> Kind:
    """``item`` if it is of ``kind``; raises InvalidField otherwise."""
    if not isinstance(item, kind):
        raise InvalidField.of("kind", f"{getattr(item, 'KIND', 'this input')} is not what the task takes")
    return item
