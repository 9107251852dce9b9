"""Logging of every process: one line a record, with the id of the request it belongs to.

Stdlib logging only. Records are JSON lines where stderr is not a terminal, plain text where it is. ``request_id`` is a
context variable: whoever accepts a request sets it, and everything logged below carries it, in whatever task it runs.
Knows nothing of gRPC. Safe from any thread; a new thread starts without a request id.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Literal, TextIO

LogFormat = Literal["auto", "json", "text"]

request_id: ContextVar[str] = ContextVar("request_id", default="")

_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id"}
# Chatty below WARNING, and what they say there concerns nobody who runs a server.
_QUIET_LIBRARIES = (
    "asyncio",
    "filelock",
    "httpcore",
    "httpx",
    "urllib3",
    "alembic",
    "sqlalchemy",
    "fsspec",
    "botocore",
)


def configure_logging(*, level: str = "INFO", log_format: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Send every record of this process to ``stream`` (stderr); replaces whatever handlers the root logger had."""
    target = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(JsonLines() if as_json else PlainText())
    handler.addFilter(_attach_request_id)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def _attach_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


class JsonLines(logging.Formatter):
    """One JSON object a line; whatever was passed as ``extra`` becomes a field of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _utc(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if rid := getattr(record, "request_id", ""):
            fields["request_id"] = rid
        fields.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD_FIELDS)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class PlainText(logging.Formatter):
    """For a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        rid = getattr(record, "request_id", "")
        text = f"{_utc(record)} {record.levelname:<7} {record.name}: {record.getMessage()}"
        if rid:
            text += f" [{rid}]"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _utc(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
