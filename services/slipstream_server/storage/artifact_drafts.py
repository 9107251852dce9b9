"""Writing an artifact: files arrive in chunks, are checked while they arrive, and become one artifact or leave nothing.

    async with store.draft("adapter") as draft:
        async with draft.file("adapter_model.safetensors", sha256=announced, size_bytes=announced) as file:
            async for chunk in chunks:
                await file.write(chunk)
        artifact = await draft.commit()

Leaving either block by an error, or the outer one without ``commit()``, removes what was staged; a process that dies
leaves a folder in staging for the collector. One draft belongs to one task of the service's event loop; files are
written one after another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self
from uuid import uuid4

from slipstream_server.errors import CorruptArtifact, DependencyUnavailable, InvalidField, WrongState
from slipstream_server.storage.artifact_manifest import (
    ArtifactLimits,
    FileEntry,
    Manifest,
    check_path,
    check_sha256,
)
from slipstream_server.storage.artifact_places import COPY_BYTES, Place
from slipstream_server.storage.blocking import BlockingThreads
from slipstream_server.storage.columns import utc_now


@dataclass(frozen=True, slots=True)
class Artifact:
    """A stored artifact: its digest, and the manifest that the digest is made of."""

    digest: str
    manifest: Manifest


class ArtifactDraft:
    """An artifact being written. Use as an async context manager."""

    def __init__(self, kind: str, limits: ArtifactLimits, place: Place, threads: BlockingThreads) -> None:
        self.threads = threads
        self._kind = kind
        self._limits = limits
        self._place = place
        self._folder: Path | None = None
        self._open_file: FileWriter | None = None
        self._entries: dict[str, FileEntry] = {}
        self._folders_of_paths: set[str] = set()
        self._staged_by_key: dict[str, Path] = {}
        self._total_bytes = 0

    async def __aenter__(self) -> Self:
        self._folder = self._place.staging / uuid4().hex
        try:
            await self.threads.run(self._folder.mkdir, mode=0o700)
        except BaseException:
            await self._remove_folder()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open_file is not None:
            await self._open_file.abort()
        await self._remove_folder()

    async def _remove_folder(self) -> None:
        if self._folder is not None:
            folder, self._folder = self._folder, None
            await self.threads.run(shutil.rmtree, folder, ignore_errors=True)

    def file(self, path: str, *, sha256: str | None = None, size_bytes: int | None = None) -> FileWriter:
        """A writer of the file ``path``; the announced is checked against the limits now, against the bytes later.

        Raises:
            InvalidField: a bad path, hash or size; a path that was there before or that is both a file and a folder.
            QuotaExceeded: the announced size, or one file more, is over the limits.
        """
        if self._open_file is not None or self._folder is None:
            raise WrongState("a draft writes one file after another, inside its block")
        self._check_new_path(check_path(path))
        if sha256 is not None:
            check_sha256(sha256, "sha256")
        if size_bytes is not None and size_bytes < 0:
            raise InvalidField.of("size_bytes", f"{size_bytes} is below 0")
        self.check_limits(size_bytes or 0)
        staged = self._folder / str(len(self._entries))
        self._open_file = FileWriter(self, path, staged, sha256, size_bytes)
        return self._open_file

    async def commit(self) -> Artifact:
        """Publish the files, then the manifest, and return the artifact. The caller then writes the row.

        Raises InvalidField where there is no file; StorageFull or DependencyUnavailable as any write.
        """
        if self._open_file is not None or self._folder is None:
            raise WrongState("a draft is committed after its last file is finished, once")
        if not self._entries:
            raise InvalidField.of("files", "an artifact holds at least one file")
        manifest = Manifest(self._kind, utc_now(), MappingProxyType(dict(self._entries)))
        digest = manifest.digest
        try:
            await self.threads.run(self._place.publish, self._staged_by_key, manifest_key(digest), manifest.to_bytes())
        except FileNotFoundError as failure:  # its folder or bucket
            raise DependencyUnavailable("the artifact store is not there") from failure
        await self._remove_folder()
        return Artifact(digest, manifest)

    def check_limits(self, file_bytes: int) -> None:
        """Raises QuotaExceeded if the open file cannot have ``file_bytes``."""
        total_bytes = self._total_bytes + file_bytes
        self._limits.check(file_bytes=file_bytes, total_bytes=total_bytes, num_files=len(self._entries) + 1)

    def file_finished(self, path: str, staged: Path, entry: FileEntry) -> None:
        self._open_file = None
        self._entries[path] = entry
        self._folders_of_paths |= _folders_above(path)
        self._total_bytes += entry.size_bytes
        # Files with equal bytes are one blob.
        self._staged_by_key[blob_key(entry.sha256)] = staged

    def file_aborted(self) -> None:
        self._open_file = None

    def _check_new_path(self, path: str) -> None:
        if (
            path in self._entries
            or path in self._folders_of_paths
            or not _folders_above(path).isdisjoint(self._entries)
        ):
            raise InvalidField.of("path", f"{path!r} collides with another file of the artifact")


class FileWriter:
    """One file of a draft. ``finish()`` at the end of its block, ``abort()`` when the block raises."""

    def __init__(
        self, draft: ArtifactDraft, path: str, staged: Path, sha256: str | None, size_bytes: int | None
    ) -> None:
        self._draft = draft
        self._path = path
        self._staged = staged
        self._expected_sha256 = sha256
        self._expected_size_bytes = size_bytes
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._buffer = bytearray()
        self._handle: FileIO | None = None
        self._entry: FileEntry | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            await self.finish()
        else:
            await self.abort()

    async def write(self, chunk: bytes) -> None:
        """Append ``chunk``.

        Raises CorruptArtifact for a byte more than announced, QuotaExceeded over the limits, StorageFull.
        """
        size_bytes = self._size_bytes + len(chunk)
        if self._expected_size_bytes is not None and size_bytes > self._expected_size_bytes:
            raise CorruptArtifact(f"{self._path!r} was announced with {self._expected_size_bytes} bytes, more arrived")
        self._draft.check_limits(size_bytes)
        self._size_bytes = size_bytes
        self._buffer += chunk
        if len(self._buffer) >= COPY_BYTES:
            await self._on_disk(self._flush)

    async def finish(self) -> FileEntry:
        """Check hash and size, and put the bytes on disk. Raises CorruptArtifact where they are not as announced."""
        if self._entry is not None:
            return self._entry
        await self._on_disk(self._close)
        entry = FileEntry(self._hash.hexdigest(), self._size_bytes)
        if self._expected_size_bytes not in (None, entry.size_bytes):
            await self._discard(f"was announced with {self._expected_size_bytes} bytes, {entry.size_bytes} arrived")
        if self._expected_sha256 not in (None, entry.sha256):
            await self._discard(f"was announced with the SHA-256 {self._expected_sha256}, but has {entry.sha256}")
        self._entry = entry
        self._draft.file_finished(self._path, self._staged, entry)
        return entry

    async def abort(self) -> None:
        """Remove what was written."""
        self._draft.file_aborted()
        await self._draft.threads.run(self._remove)

    async def _discard(self, why: str) -> None:
        await self.abort()
        raise CorruptArtifact(f"{self._path!r} {why}")

    async def _on_disk(self, step: Callable[[], None]) -> None:
        try:
            await self._draft.threads.run(step)
        except BaseException:
            await self.abort()
            raise

    def _flush(self) -> None:
        if self._handle is None:
            self._handle = FileIO(self._staged, "xb")
        self._hash.update(self._buffer)
        remaining = memoryview(self._buffer)
        while remaining:
            remaining = remaining[self._handle.write(remaining) :]
        remaining.release()
        self._buffer = bytearray()

    def _close(self) -> None:
        self._flush()
        assert self._handle is not None
        os.fsync(self._handle.fileno())
        self._handle.close()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._staged.unlink(missing_ok=True)


def _folders_above(path: str) -> set[str]:
    segments = path.split("/")
    return {"/".join(segments[:depth]) for depth in range(1, len(segments))}


def blob_key(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_key(digest: str) -> str:
    return f"manifests/sha256/{digest[:2]}/{digest}"
