"""Where the bytes of artifacts lie: a folder of this machine, or an object store behind fsspec.

    blobs/sha256/ab/abcdef...       one file's bytes, named by their hash
    manifests/sha256/ab/abcdef...   one artifact's manifest, named by the artifact's digest
    staging/                        what is being written; always a folder of this machine

A place moves finished files from staging to their keys, and is the only one that deletes. Everything here blocks: it
runs in the store's threads. Keys are made of digests by the store; nothing a client says reaches a path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from slipstream_server.errors import DependencyUnavailable, SlipstreamError

COPY_BYTES = 1024 * 1024
_READ_ONLY = 0o444


@dataclass(frozen=True, slots=True)
class Stored:
    """One key of a place and when it was last written or touched, in seconds since 1970."""

    key: str
    modified_s: float


class Place(Protocol):
    """What the store asks of a place. A key that is not there is FileNotFoundError."""

    staging: Path

    def publish(self, staged: dict[str, Path], manifest_key: str, manifest: bytes) -> None:
        """Move ``staged`` files to their keys, then write the manifest; each appears whole or not at all."""

    def touch(self, key: str, data: bytes) -> None:
        """Make ``key``, whose content is ``data``, as young as if it had just been written."""

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of ``key``, at most 1 MiB at a time."""

    def link(self, key: str, target: Path) -> bool:
        """Make ``target`` a hard link to ``key`` where that is possible; says whether it did."""

    def listed(self, prefix: str) -> Iterator[Stored]: ...

    def delete_if_older(self, key: str, modified_before_s: float) -> bool:
        """Delete ``key`` unless it was written or touched since; says whether it did."""


class LocalPlace:
    """A folder. A file lock between publishing and deleting closes their race across processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.staging = root / "staging"
        for folder in (root, self.staging):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def publish(self, staged: dict[str, Path], manifest_key: str, manifest: bytes) -> None:
        with self._locked(fcntl.LOCK_SH):
            # The file that was just checked replaces an equal one that may lie there: young again, and mended if it
            # had rotted.
            for key, file in staged.items():
                os.utime(file)
                os.chmod(file, _READ_ONLY)
                os.replace(file, self._parent_of(key) / Path(key).name)
            for folder in {self._parent_of(key) for key in staged}:
                _sync_folder(folder)
            self._write(manifest_key, manifest)

    def touch(self, key: str, data: bytes) -> None:
        with self._locked(fcntl.LOCK_SH):
            os.utime(self._root / key)

    def chunks(self, key: str) -> Iterator[bytes]:
        with open(self._root / key, "rb", buffering=0) as file:
            while chunk := file.read(COPY_BYTES):
                yield chunk

    def link(self, key: str, target: Path) -> bool:
        try:
            os.link(self._root / key, target)
        except FileNotFoundError:
            raise
        except OSError:
            return False
        return True

    def listed(self, prefix: str) -> Iterator[Stored]:
        for folder, _, names in os.walk(self._root / prefix):
            for name in names:
                file = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    yield Stored(file.relative_to(self._root).as_posix(), file.stat().st_mtime)

    def delete_if_older(self, key: str, modified_before_s: float) -> bool:
        file = self._root / key
        with self._locked(fcntl.LOCK_EX), contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < modified_before_s:
                file.unlink()
                return True
        return False

    def _write(self, key: str, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self.staging)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _READ_ONLY)
            os.replace(temporary, self._parent_of(key) / Path(key).name)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync_folder(self._parent_of(key))

    def _parent_of(self, key: str) -> Path:
        folder = (self._root / key).parent
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for ancestor in folder.relative_to(self._root).parents:
                _sync_folder(self._root / ancestor)
        return folder

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with open(self._root / "lock", "ab") as file:
            fcntl.flock(file, how)
            yield


class ObjectPlace:
    """A prefix of an object store. An object appears when its upload is complete; a new upload replaces an equal one.

    Object stores have no lock, so only the process that collects garbage may publish here; the grace period covers
    what other processes read. Uploads that a crash cut off are the bucket's to drop (a lifecycle rule for incomplete
    multipart uploads).
    """

    def __init__(self, filesystem: Any, root: str, staging: Path) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._publishing_or_deleting = threading.Lock()
        self.staging = staging
        staging.mkdir(mode=0o700, parents=True, exist_ok=True)

    def publish(self, staged: dict[str, Path], manifest_key: str, manifest: bytes) -> None:
        with _answered():
            for key, file in staged.items():
                self._filesystem.put_file(str(file), self._path(key))
        with _answered(), self._publishing_or_deleting:
            for key, file in staged.items():
                # A collector may have judged the object's old age just before it became young.
                if not self._filesystem.exists(self._path(key)):
                    self._filesystem.put_file(str(file), self._path(key))
            self._filesystem.pipe_file(self._path(manifest_key), manifest)

    def touch(self, key: str, data: bytes) -> None:
        with _answered(), self._publishing_or_deleting:
            self._filesystem.info(self._path(key))
            self._filesystem.pipe_file(self._path(key), data)

    def chunks(self, key: str) -> Iterator[bytes]:
        with _answered(), self._filesystem.open(self._path(key), "rb", block_size=4 * COPY_BYTES) as file:
            while chunk := file.read(COPY_BYTES):
                yield chunk

    def link(self, key: str, target: Path) -> bool:
        return False

    def listed(self, prefix: str) -> Iterator[Stored]:
        with _answered():
            found: dict[str, dict[str, Any]] = self._filesystem.find(self._path(prefix), detail=True)
        for path, info in found.items():
            yield Stored(path.removeprefix(f"{self._root}/"), _modified_s(info))

    def delete_if_older(self, key: str, modified_before_s: float) -> bool:
        with _answered(), self._publishing_or_deleting, contextlib.suppress(FileNotFoundError):
            if _modified_s(self._filesystem.info(self._path(key))) < modified_before_s:
                self._filesystem.rm_file(self._path(key))
                return True
        return False

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Failures of an object store, of whichever library below fsspec, are one: it does not answer as it should."""
    try:
        yield
    except (FileNotFoundError, SlipstreamError):
        raise
    except Exception as failure:
        raise DependencyUnavailable("the artifact store does not answer", retry_after_s=1.0) from failure


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _modified_s(info: dict[str, Any]) -> float:
    modified = info.get("LastModified") or info.get("mtime") or info.get("created")
    return modified.timestamp() if isinstance(modified, datetime) else float(modified or 0)
