"""Logging of every process: one line a record, with the id of the request it belongs to.

Stdlib logging only. Records are JSON lines where stderr is not a terminal, plain text where it is. ``request_id`` is a
context variable: whoever accepts a request sets it, and everything logged below carries it, in whatever task it runs.
What nobody foresaw is logged under an id, which is all that the asker learns of it.
Knows nothing of gRPC. Safe from any thread; a new thread starts without a request id.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from contextvars import ContextVar
from typing import Literal, TextIO

from slipstream_server.errors import InternalError

LogFormat = Literal["auto", "json", "text"]

logger = logging.getLogger(__name__)

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


def log_failure(error: BaseException, doing: str) -> str:
    """Log what nobody foresaw, with its traceback; returns the id under which it stands there."""
    error_id = secrets.token_hex(6)
    logger.error("unforeseen %s while %s, error_id %s", type(error).__name__, doing, error_id, exc_info=error)
    return error_id


def unforeseen(error: BaseException, doing: str) -> InternalError:
    """Log what nobody foresaw, and what to answer whoever asked: an id, and nothing of the error itself."""
    error_id = log_failure(error, doing)
    message = f"internal error; the server's log tells more under error_id {error_id}"
    return InternalError(message, metadata={"error_id": error_id})


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
