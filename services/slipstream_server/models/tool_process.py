"""Runs one of this room's own programs (``examine``, ``make``, ``export``) as a subprocess: a JSON request in, progress
lines and one JSON answer out. Free of torch; event loop.

The program never outlives the call that runs it: it is killed when the call ends, is cancelled or takes too long, and
with this process (``with_parent``); it also ends itself when its standard input closes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from slipstream_server import errors
from slipstream_server.errors import DeadlineExceeded, FieldViolation, InternalError, OutOfMemory, SlipstreamError
from slipstream_server.models import with_parent

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 16 * 1024 * 1024
_ERRORS: Mapping[str, type[SlipstreamError]] = {
    error.__name__: error
    for error in (
        errors.CorruptArtifact,
        errors.IncompatibleAdapter,
        errors.InvalidField,
        errors.MissingDependency,
        errors.ModelLoadFailed,
        errors.OutOfMemory,
        errors.StorageFull,
        errors.UnsafeWeights,
        errors.UnsupportedField,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolProgress:
    """How far one stage has come; ``total`` is None where it is not known. ``unit`` says what is counted."""

    stage: str
    done: int = 0
    total: int | None = None
    unit: str = ""


ReportProgress = Callable[[ToolProgress], None]


def ignore_tool_progress(progress: ToolProgress) -> None:
    """For callers that do not want to know."""


async def run_tool(
    program: str,
    request: Mapping[str, Any],
    *,
    timeout_s: float,
    report: ReportProgress = ignore_tool_progress,
) -> dict[str, Any]:
    """The answer of ``python -m slipstream_server.models.PROGRAM``; raises the SlipstreamError it ends with,
    OutOfMemory where the system ended it, DeadlineExceeded after ``timeout_s``.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": with_parent.import_path()}
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *with_parent.command(f"slipstream_server.models.{program}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=environment,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout_s):
                answer = await _converse(process, request, report)
                code = await process.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"the work took over {timeout_s:.0f} s and was ended") from None
        finally:
            await _end(process)
        if code != 0 or "result" not in answer:
            _note(program, code, log)
            raise _failure(answer, code)
        result: dict[str, Any] = answer["result"]
        return result


async def _converse(
    process: asyncio.subprocess.Process, request: Mapping[str, Any], report: ReportProgress
) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(ConnectionError):  # it died at once; its status tells why
        process.stdin.write(json.dumps(request).encode() + b"\n")
        await process.stdin.drain()
    last: dict[str, Any] = {}
    async for line in process.stdout:
        message = _parsed(line)
        if "stage" in message:
            report(ToolProgress(**message))
        elif message:
            last = message
    return last


def _parsed(line: bytes) -> dict[str, Any]:
    """A message of the program; libraries that print something of their own are passed over."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    # The reaping must not be cut short by a second cancellation: it takes no time after a kill.
    await asyncio.shield(process.wait())


def _note(program: str, code: int, log: IO[bytes]) -> None:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 4000))
    logger.warning("%s ended with %s: %s", program, code, log.read().decode(errors="replace"))


def _failure(answer: Mapping[str, Any], code: int) -> SlipstreamError:
    if code == -signal.SIGKILL and not answer:
        return OutOfMemory("the system ended the work, most likely for want of memory")
    error_class = _ERRORS.get(str(answer.get("error")))
    if error_class is None:
        return InternalError("the work failed; the log tells why")
    violations = [FieldViolation(field, text) for field, text in answer.get("violations", ())]
    return error_class(str(answer["message"]), violations=violations)
