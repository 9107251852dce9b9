"""Who has reserved how much memory of which device: a small file in the data directory that all services share.

    {"reservations": {"training/job-7": {"device_bytes": {"cuda:0": 4000000000}, "pid": 4711, "start": "..."}}}

A reservation belongs to a process and ends with it, however it ends: whoever looks next drops what the dead left. Every
change happens under a lock of the kernel's and replaces the file whole. Blocks for milliseconds; any thread, any
number of processes on one machine.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from slipstream_server.errors import InvalidField, OutOfMemory
from slipstream_server.storage.blocking import named
from slipstream_server.storage.process_identity import ProcessIdentity

FILE = "devices.json"

logger = logging.getLogger(__name__)


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by device, and the process whose life they are bound to."""

    device_bytes: dict[str, int]
    pid: int
    start: str

    @property
    def holder(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.start)


class _Book(msgspec.Struct, frozen=True, kw_only=True):
    reservations: dict[str, Reservation] = {}


class DeviceLedger:
    """The ledger of one machine, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE

    def reserve(
        self,
        name: str,
        device_bytes: Mapping[str, int],
        capacity_bytes: Mapping[str, int],
        holder: ProcessIdentity | None = None,
    ) -> None:
        """Reserve under ``name``, in place of what it had; ``holder`` is this process where none is given.

        Raises OutOfMemory, with the numbers, where a device has not that much left.
        """
        holder = holder or ProcessIdentity.current()
        for device, wanted in device_bytes.items():
            if wanted < 0:
                raise InvalidField.of("device_bytes", f"{wanted} bytes on {device} is below 0")
        with self._changing() as reservations:
            reservations.pop(name, None)
            for device, wanted in device_bytes.items():
                left = capacity_bytes.get(device, 0) - _reserved(reservations, device)
                if wanted > left:
                    raise not_enough(device, wanted, max(0, left))
            reservations[name] = Reservation(device_bytes=dict(device_bytes), pid=holder.pid, start=holder.start)

    def hand_over(self, name: str, holder: ProcessIdentity) -> None:
        """Bind the reservation ``name`` to the life of another process; does nothing where there is none."""
        with self._changing() as reservations:
            if (found := reservations.get(name)) is not None:
                reservations[name] = Reservation(device_bytes=found.device_bytes, pid=holder.pid, start=holder.start)

    def release(self, name: str) -> None:
        with self._changing() as reservations:
            reservations.pop(name, None)

    def reserved_bytes(self, device: str) -> int:
        """What living processes have reserved of ``device``."""
        with self._changing() as reservations:
            return _reserved(reservations, device)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Reservation]]:
        """What stands in the file, the dead's left out; written back where the block does not raise."""
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise named(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._read()
            living = {name: found for name, found in before.items() if found.holder.is_alive()}
            yield living
            if living != before:
                self._write(living)
        finally:
            os.close(lock)

    def _read(self) -> dict[str, Reservation]:
        try:
            return dict(msgspec.json.decode(self._file.read_bytes(), type=_Book).reservations)
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError:
            logger.warning("the device ledger was not readable and begins anew")
            return {}

    def _write(self, reservations: dict[str, Reservation]) -> None:
        temporary = self._file.with_suffix(".new")
        try:
            temporary.write_bytes(msgspec.json.encode(_Book(reservations=reservations)))
            temporary.replace(self._file)
        except OSError as error:
            raise named(error) from error


def not_enough(device: str, wanted_bytes: int, left_bytes: int) -> OutOfMemory:
    text = f"{gib(wanted_bytes)} on {device} are needed, {gib(left_bytes)} are left"
    metadata = {"device": device, "needed_bytes": str(wanted_bytes), "left_bytes": str(left_bytes)}
    return OutOfMemory(text, metadata=metadata)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB"


def _reserved(reservations: Mapping[str, Reservation], device: str) -> int:
    return sum(found.device_bytes.get(device, 0) for found in reservations.values())
