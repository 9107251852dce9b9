"""Errors that the worker names by reason, as exceptions of the front. Pure; any thread."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream_server.errors import FieldViolation, InternalError, SlipstreamError


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


def error_of(reason: str, message: str, field: str = "", metadata: Mapping[str, str] | None = None) -> SlipstreamError:
    """The exception for a reason, and for the field at fault; InternalError for a reason that nobody knows."""
    violations = [FieldViolation(field, message.removeprefix(f"{field}: "))] if field else []
    return _CLASSES.get(reason, InternalError)(message, violations=violations, metadata=metadata)
