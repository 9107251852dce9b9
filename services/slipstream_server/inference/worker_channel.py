"""The worker's end of the socket: frames in on one thread, frames out on another, bounded queues between them and the
engine's.

The reader blocks while the inbox is full and the engine while the outbox is, so that whoever is slow slows the other
and nothing piles up. When the front goes away, ``next_command`` says so, and should the engine not look within a few
seconds, the process ends from here. Torch-free.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from contextlib import suppress
from pathlib import Path

from slipstream_server.inference.generation import (
    MAX_FRAME_BYTES,
    Command,
    Event,
    decode_command,
    event_frames,
)

logger = logging.getLogger(__name__)

_MAX_COMMANDS = 65_536
_MAX_STEPS = 256
_LAST_WORDS_S = 5.0
_ORPHAN_GRACE_S = 5.0
EXIT_ORPHANED = 4


class Gone:
    """In place of a command: the front has closed the connection, or does not speak the protocol."""


class Woken:
    """In place of a command: the engine has something to do."""


class Channel:
    """A connected socket with its two threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._inbox: queue.Queue[Command | Gone | Woken] = queue.Queue(_MAX_COMMANDS)
        self._outbox: queue.Queue[list[Event] | None] = queue.Queue(_MAX_STEPS)
        self._gone = threading.Event()
        self._writer = threading.Thread(target=self._write, name="events-out", daemon=True)
        self._reader = threading.Thread(target=self._read, name="commands-in", daemon=True)
        self._writer.start()
        self._reader.start()

    @classmethod
    def connect(cls, path: Path) -> Channel:
        """Connect to the front that listens on ``path``; OSError where none does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(path))
        return cls(connection)

    def next_command(self, wait_s: float | None) -> Command | Gone | Woken | None:
        """The next command, after at most ``wait_s`` seconds (None: no limit); None where there is none."""
        try:
            return self._inbox.get(block=wait_s != 0.0, timeout=wait_s)
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Let ``next_command`` return. From any thread; nothing waits where commands lie ready anyway."""
        with suppress(queue.Full):
            self._inbox.put_nowait(Woken())

    def send(self, events: list[Event]) -> bool:
        """Hand over the events of one step; waits while the front reads slower than we write. False once it is gone."""
        while not self._gone.is_set():
            try:
                self._outbox.put(events, timeout=1.0)
                return True
            except queue.Full:
                continue
        return False

    def send_last(self, events: list[Event]) -> None:
        """Send and wait until everything has gone out, for a few seconds at most."""
        self.send(events)
        self.close()

    def close(self) -> None:
        """Send what is left, for a few seconds at most, and hang up."""
        if self._writer.is_alive() and not self._gone.is_set():
            try:
                self._outbox.put(None, timeout=_LAST_WORDS_S)
            except queue.Full:
                return
            self._writer.join(_LAST_WORDS_S)

    def _read(self) -> None:
        try:
            while (payload := self._receive_frame()) is not None:
                self._inbox.put(decode_command(payload))
        except OSError as error:
            logger.error("reading from the front: %s", error)
        except Exception:
            logger.exception("the front does not speak the protocol")
        self._gone.set()
        orphaned = threading.Timer(_ORPHAN_GRACE_S, os._exit, (EXIT_ORPHANED,))
        orphaned.daemon = True
        orphaned.start()
        self._inbox.put(Gone())

    def _receive_frame(self) -> bytes | None:
        header = self._receive(4)
        if header is None:
            return None
        length = int.from_bytes(header, "big")
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"frame of {length} bytes; at most {MAX_FRAME_BYTES}")
        return self._receive(length)

    def _receive(self, length: int) -> bytes | None:
        """Exactly ``length`` bytes, or None at the end of the stream."""
        parts = bytearray()
        while len(parts) < length:
            part = self._socket.recv(min(length - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)

    def _write(self) -> None:
        try:
            while (events := self._next_events()) is not None:
                for frame in event_frames(events):
                    self._socket.sendall(frame)
        except OSError as error:
            if not self._gone.is_set():
                logger.error("writing to the front: %s", error)
        except Exception:
            logger.exception("events cannot be sent")
        # Wakes the reader, which then reports that the front is gone.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _next_events(self) -> list[Event] | None:
        return self._outbox.get()
