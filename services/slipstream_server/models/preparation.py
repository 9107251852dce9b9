"""Runs ``prepare`` as a subprocess and brings its answer back. Free of torch; blocking; any thread."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from slipstream_server import errors
from slipstream_server.errors import ModelLoadFailed, SlipstreamError
from slipstream_server.models import with_parent
from slipstream_server.models.priority import is_lowered, lower_process

logger = logging.getLogger(__name__)

_TIMEOUT_S = 3600.0
_HEARTBEAT_S = 0.5
_MAX_OUTPUT_BYTES = 1024 * 1024
_MAX_PROGRESS_BYTES = 1024
_ERRORS: dict[str, type[SlipstreamError]] = {
    error.__name__: error
    for error in (
        errors.UnsafeWeights,
        errors.CorruptArtifact,
        errors.OutOfMemory,
        errors.StorageFull,
        errors.ModelLoadFailed,
    )
}


Heartbeat = Callable[[float], None]
"""Called now and then while the subprocess runs, with how far it says it is, 0 to 1; what it raises ends the subprocess
and the call."""


def ignore_heartbeat(fraction: float) -> None:
    """For callers that wait to the end."""


def run_preparation(
    source: Path,
    target: Path,
    *,
    tokenizer: Path | None = None,
    dtype: str = "float32",
    heartbeat: Heartbeat = ignore_heartbeat,
) -> dict[str, str]:
    """Fill the empty folder ``target`` with the prepared form of ``source``; returns the versions that did it.

    Raises UnsafeWeights, CorruptArtifact, OutOfMemory, StorageFull or ModelLoadFailed. The subprocess never outlives
    the call, nor this process.
    """
    arguments = ["--source", str(source), "--target", str(target), "--dtype", dtype]
    if tokenizer is not None:
        arguments += ["--tokenizer", str(tokenizer)]
    return _run("slipstream_server.models.prepare", arguments, heartbeat)


def run_sentiment_recipe(
    base: Path, data: Path, target: Path, *, heartbeat: Heartbeat = ignore_heartbeat
) -> dict[str, str]:
    """Fill the folder ``target`` with ``base``, fine-tuned on the sentences in ``data``; returns what came of it.

    Raises OutOfMemory, StorageFull or ModelLoadFailed. The subprocess never outlives the call, nor this process.
    """
    arguments = ["--base", str(base), "--data", str(data), "--target", str(target)]
    return _run("slipstream_server.models.sentiment", arguments, heartbeat)


def sentiment_recipe() -> str:
    """Names the state of the recipe, 16 hex digits: another program may make another model of the same files."""
    return hashlib.sha256(Path(__file__).with_name("sentiment.py").read_bytes()).hexdigest()[:16]


def _run(module: str, arguments: Sequence[str], heartbeat: Heartbeat) -> dict[str, str]:
    """The last line that the module's program writes, which is a JSON object; lines before it may tell progress."""
    command = with_parent.command(module, *arguments)
    # Whatever transformers would fetch of its own accord, it must not.
    environment = {
        "GOMP_SPINCOUNT": "30000",  # unless set: threads that spin for long lose most on cores that others want too
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "PYTHONPATH": with_parent.import_path(),
    }
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=log, env=environment, start_new_session=True
        ) as process:
            # A service fetches beside its streams; whoever pulls from the command line waits for it.
            if is_lowered():
                lower_process(process.pid)
            try:
                _await(process, lambda: heartbeat(_fraction(output)))
            finally:
                process.kill()
        output.seek(0)
        answer = _last_line(output.read(_MAX_OUTPUT_BYTES))
        if process.returncode != 0:
            log.seek(0)
            logger.warning(
                "preparing a model ended with %s: %s", process.returncode, log.read()[-4000:].decode(errors="replace")
            )
            raise _failure(answer, process.returncode)
    return answer


def _await(process: subprocess.Popen[bytes], heartbeat: Callable[[], None]) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            process.wait(timeout=_HEARTBEAT_S)
            return
        except subprocess.TimeoutExpired:
            heartbeat()
    raise ModelLoadFailed(f"preparing the model took over {_TIMEOUT_S:.0f} s")


def _fraction(output: IO[bytes]) -> float:
    """How far the program has said it is, read without moving the place where it writes."""
    end = os.fstat(output.fileno()).st_size
    written = os.pread(output.fileno(), _MAX_PROGRESS_BYTES, max(0, end - _MAX_PROGRESS_BYTES))
    told = _last_line(written[: written.rfind(b"\n") + 1])
    return float(told.get("fraction", 1.0 if told else 0.0))


def _last_line(output: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _failure(answer: dict[str, Any], status: int) -> SlipstreamError:
    if status in (-9, 137) and not answer:
        return errors.OutOfMemory("the system ended the preparation of the model, most likely for want of memory")
    error_class = _ERRORS.get(answer.get("error", ""), ModelLoadFailed)
    return error_class(answer.get("message") or "the model could not be prepared")
