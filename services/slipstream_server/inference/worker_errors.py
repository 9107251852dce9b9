"""Errors that the worker names by reason, as exceptions of the front. Pure; any thread."""

from __future__ import annotations

import re

from slipstream_server.errors import InternalError, InvalidRequest, SlipstreamError


def _by_reason() -> dict[str, type[SlipstreamError]]:
    """Reason to class, where of classes that share a reason the most particular one counts."""
    found: dict[str, type[SlipstreamError]] = {}
    pending: list[type[SlipstreamError]] = [SlipstreamError]
    while pending:
        error_class = pending.pop()
        children = error_class.__subclasses__()
        pending += children
        if not children:
            found[error_class.reason] = error_class
    return found


_CLASSES = _by_reason()
_FIELD = re.compile(r"([a-z_]+(?:[.\[][a-z0-9_.\[\]]+)?): ")


def error_of(reason: str, message: str, *, retry_after_s: float | None = None) -> SlipstreamError:
    """The exception for a reason; InternalError for one that nobody knows."""
    error_class = _CLASSES.get(reason, InternalError)
    field = _FIELD.match(message)
    if field is not None and issubclass(error_class, InvalidRequest):
        return error_class.of(field[1], message[field.end() :])
    return error_class(message, retry_after_s=retry_after_s)
