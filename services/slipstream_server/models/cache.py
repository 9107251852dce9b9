"""The folder that holds prepared models: complete or absent, built once, whatever dies meanwhile.

    ROOT/prepared/KEY/      a prepared folder; never changed once it has this name
    ROOT/pointers/NAME.json where a catalogue name was last resolved to
    ROOT/partial/KEY-*/     being built; leftovers of a crash, removed by the next builder of KEY
    ROOT/locks/KEY.lock     held while KEY is built, by one process at a time

Knows nothing of sources. Blocking; any thread, any number of processes on one machine.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slipstream_server.errors import CorruptArtifact, ModelNotReady, StorageFull
from slipstream_server.models.folder import PROVENANCE, read_json

_LOCK_TIMEOUT_S = 3600.0


def default_cache_root() -> Path:
    """``$SLIPSTREAM_HOME/models``, or ``slipstream/models`` in the platform's cache folder of the user."""
    if home := os.environ.get("SLIPSTREAM_HOME"):
        return Path(home).expanduser() / "models"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "slipstream" / "models"


@dataclass(frozen=True, slots=True)
class ModelCache:
    """Prepared folders under one root. ``key`` names content: the same key always means the same files."""

    root: Path

    def folder(self, key: str) -> Path:
        return self.root / "prepared" / key

    def build(self, key: str, fill: Callable[[Path], Mapping[str, Any]]) -> Path:
        """The folder of ``key``, filled by ``fill`` if it is not there yet.

        ``fill`` gets an empty folder and returns the provenance to keep beside the files. Concurrent callers wait for
        the first; a caller that dies leaves nothing that another would take for complete.
        """
        if self.folder(key).is_dir():
            return self.folder(key)
        with self.lock(key), storage_errors():
            if not self.folder(key).is_dir():
                self._fill(key, fill)
        return self.folder(key)

    def _fill(self, key: str, fill: Callable[[Path], Mapping[str, Any]]) -> None:
        partial_root = self.root / "partial"
        partial_root.mkdir(parents=True, exist_ok=True)
        for leftover in partial_root.glob(f"{key}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=partial_root))
        try:
            _write_json(partial / PROVENANCE, fill(partial))
            _flush_to_disk(partial)
            _open_to_readers(partial)
            self.folder(key).parent.mkdir(parents=True, exist_ok=True)
            partial.rename(self.folder(key))
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Exclusive among processes and threads; the system releases it when the holder dies."""
        lock_folder = self.root / "locks"
        with storage_errors():
            lock_folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_folder / f"{key}.lock", is_singleton=False, thread_local=False)
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S, poll_interval=0.1)
        except Timeout as error:
            raise ModelNotReady(
                f"another process has been preparing this model for over {_LOCK_TIMEOUT_S:.0f} s"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def remember(self, name: str, pointer: Mapping[str, Any]) -> None:
        """Note where catalogue name ``name`` was resolved to, so that the next start needs no network."""
        path = self._pointer_path(name)
        with storage_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_json(path, pointer)

    def recall(self, name: str) -> dict[str, Any] | None:
        """What ``remember`` noted, if its folder is still there."""
        try:
            pointer = read_json(self._pointer_path(name))
        except CorruptArtifact:
            return None
        folder = pointer.get("folder")
        return pointer if isinstance(folder, str) and Path(folder, "config.json").is_file() else None

    def _pointer_path(self, name: str) -> Path:
        return self.root / "pointers" / f"{name}.json"


@contextmanager
def storage_errors() -> Iterator[None]:
    """A full disk becomes StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("the disk of the model cache is full") from error
        raise


def require_free_bytes(folder: Path, needed_bytes: int) -> None:
    """Raise StorageFull unless the disk that will hold ``folder`` has room for ``needed_bytes`` and 1% to spare."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes * 1.01 > free_bytes:
        raise StorageFull(f"{needed_bytes} bytes are needed and {free_bytes} are free on the disk of the model cache")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside, flushed, renamed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _open_to_readers(folder: Path) -> None:
    """Private temporary files become ordinary ones; who may read them at all, the cache root's mode decides."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)


def _flush_to_disk(folder: Path) -> None:
    """The rename must not survive a power cut that the files did not."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
