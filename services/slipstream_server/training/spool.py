"""The file through which a runner's events reach the supervisor: JSON Lines, appended by one process tree, read by
another.

A file and no pipe, so that either side may die and come back. The writer appends every record with one write, the
reader takes only lines that have their end and says at which byte to go on: what it returned and that offset belong in
one transaction. A line that is no event (a disk that was full, a torn write) is counted and passed over. Blocking; the
writer is for one thread, the reader has no state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from slipstream_server.training.events import AnyEvent

# No record is longer; the reader needs room for one.
MAX_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolBatch:
    """Events in file order; reading goes on at ``next_offset``. ``num_malformed`` lines were passed over."""

    events: Sequence[AnyEvent]
    next_offset: int
    num_malformed: int


class SpoolWriter:
    """Appends events to the spool of one attempt."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._encoder = msgspec.json.Encoder()

    def write(self, event: AnyEvent) -> None:
        """Append ``event`` as one whole line; raises OSError, and leaves no half line behind, where there is no room
        for it.
        """
        line = self._encoder.encode(event) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"an event of {len(line)} bytes; at most {MAX_LINE_BYTES}")
        written = os.write(self._file, line)
        if written < len(line):
            self._finish(line, written)

    def _finish(self, line: bytes, written: int) -> None:
        """A disk that fills up takes the beginning of a line: write the rest, or take the beginning back."""
        start = os.lseek(self._file, 0, os.SEEK_END) - written
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, start)
            raise

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_spool(path: Path, offset: int, *, max_bytes: int = 1024 * 1024) -> SpoolBatch:
    """The events of the whole lines from byte ``offset`` on, of about ``max_bytes`` at most; none where there is no
    file yet.

    Call again until a batch has neither events nor malformed lines. A file shorter than ``offset`` gives nothing.
    """
    content = _read(path, offset, max(max_bytes, MAX_LINE_BYTES))
    end = content.rfind(b"\n") + 1
    if end == 0 and len(content) >= MAX_LINE_BYTES:
        return SpoolBatch(events=(), next_offset=offset + len(content), num_malformed=1)
    decoded = [_decode(line) for line in content[:end].split(b"\n")[:-1]]
    events = [event for event in decoded if event is not None]
    return SpoolBatch(events=events, next_offset=offset + end, num_malformed=len(decoded) - len(events))


_DECODER = msgspec.json.Decoder(AnyEvent)


def _decode(line: bytes) -> AnyEvent | None:
    try:
        event: AnyEvent = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return event


def _read(path: Path, offset: int, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(max_bytes)
    except FileNotFoundError:
        return b""
