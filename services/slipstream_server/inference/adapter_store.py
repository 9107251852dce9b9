"""Adapter files on this machine's disk, by digest: fetched once, whoever asks first, and hashed before anybody reads.

    root/<digest>/adapter_config.json, adapter_model.safetensors      complete and verified when it was renamed here
    root/partial-<random>/                                            a fetch under way, or what a crash left of one

A digest that stands here when a process first uses it is hashed again, so that a file that was cut or changed since is
fetched anew. Requests that want a version while it is being fetched wait for the same fetch; other requests do not
notice. Event loop; hashing and writing run in threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from slipstream_server.errors import CorruptArtifact, StorageFull
from slipstream_server.inference.registry_copy import AdapterFile, ServableVersion
from slipstream_server.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from slipstream_server.storage.artifact_manifest import FileEntry, Manifest
from slipstream_server.storage.database_errors import OUT_OF_SPACE

logger = logging.getLogger(__name__)

FILES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS})
MAX_ADAPTER_BYTES = 8 * 1024**3
DEFAULT_MAX_BYTES = 32 * 1024**3
_PARTIAL = "partial-"
_PARTIAL_IS_DEAD_S = 3600.0


@dataclass(frozen=True, slots=True)
class FileChunk:
    """Bytes of the file ``path``, from ``offset_bytes`` on."""

    path: str
    offset_bytes: int
    data: bytes


Fetch = Callable[[ServableVersion], AsyncIterator[FileChunk]]
"""Streams the files of a version, each from its first byte to its last; raises a SlipstreamError."""


class AdapterStore:
    """The local files. ``fetch`` brings what is not here."""

    def __init__(self, root: Path, fetch: Fetch) -> None:
        self._root = root
        self._fetch = fetch
        self._verified: set[str] = set()
        self._coming: dict[str, asyncio.Task[Path]] = {}

    async def folder_of(self, version: ServableVersion) -> Path:
        """The folder with the version's files, hashed. Cancelling it does not cancel the fetch that others wait for.

        Raises CorruptArtifact, StorageFull, and whatever ``fetch`` does.
        """
        folder = self._root / version.digest
        if version.digest in self._verified and folder.is_dir():
            return folder
        task = self._coming.get(version.digest)
        if task is None:
            # A context of its own: the fetch belongs to all who wait, not to the deadline of the first.
            task = asyncio.create_task(self._bring(version, folder), context=contextvars.Context())
            self._coming[version.digest] = task
            task.add_done_callback(lambda done: self._arrived(version.digest, done))
        return await asyncio.shield(task)

    def tidy(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Remove what crashes left behind and the adapters longest unused beyond ``max_bytes``. Blocks; at start only,
        while nothing is served.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            folders = [path for path in self._root.iterdir() if path.is_dir()]
            _remove_oldest(sorted(folders, key=_last_use_s, reverse=True), max_bytes)
        except OSError as error:
            logger.warning("the folder of fetched adapters cannot be tidied (%s)", error.strerror)

    async def close(self) -> None:
        """End the fetches under way."""
        tasks = list(self._coming.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _arrived(self, digest: str, task: asyncio.Task[Path]) -> None:
        self._coming.pop(digest, None)
        if not task.cancelled() and task.exception() is None:
            self._verified.add(digest)

    async def _bring(self, version: ServableVersion, folder: Path) -> Path:
        _check_manifest(version)
        try:
            if not await asyncio.to_thread(_is_whole, folder, version.files):
                began_s = time.monotonic()
                await self._download(version, folder)
                logger.info("adapter %s fetched in %.1f s", version.name, time.monotonic() - began_s)
        except OSError as error:
            if error.errno in OUT_OF_SPACE:
                raise StorageFull("the disk that keeps fetched adapters is full", retry_after_s=30.0) from error
            raise
        return folder

    async def _download(self, version: ServableVersion, folder: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._root))
        try:
            await self._receive(version, partial)
            await asyncio.to_thread(_put_in_place, partial, folder, version.files)
        finally:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)

    async def _receive(self, version: ServableVersion, partial: Path) -> None:
        writers = {file.path: _Writer(partial, file) for file in version.files}
        try:
            chunks = self._fetch(version)
            async with aclosing(chunks):  # type: ignore[type-var]  # an async generator in practice
                async for chunk in chunks:
                    if chunk.path not in writers:
                        raise CorruptArtifact(f"{version.name}: a file came that does not belong to it")
                    await asyncio.to_thread(writers[chunk.path].write, chunk)
            for writer in writers.values():
                await asyncio.to_thread(writer.finish)
        finally:
            for writer in writers.values():
                writer.close()


class _Writer:
    """One file on its way to the disk, hashed as it comes."""

    def __init__(self, folder: Path, file: AdapterFile) -> None:
        self._expected = file
        self._file: BinaryIO = (folder / file.path).open("wb")
        self._hash = hashlib.sha256()
        self._written = 0

    def write(self, chunk: FileChunk) -> None:
        if chunk.offset_bytes != self._written or self._written + len(chunk.data) > self._expected.size_bytes:
            raise CorruptArtifact(f"{self._expected.path}: bytes came out of order, or more than were announced")
        self._file.write(chunk.data)
        self._hash.update(chunk.data)
        self._written += len(chunk.data)

    def finish(self) -> None:
        """Raises CorruptArtifact unless exactly the announced bytes have come."""
        if self._written != self._expected.size_bytes or self._hash.hexdigest() != self._expected.sha256:
            raise CorruptArtifact(f"{self._expected.path}: other bytes came than were announced")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _check_manifest(version: ServableVersion) -> None:
    """Raises CorruptArtifact unless the files are an adapter's and the digest is theirs."""
    files = {file.path: FileEntry(file.sha256, file.size_bytes) for file in version.files}
    if files.keys() != FILES or sum(entry.size_bytes for entry in files.values()) > MAX_ADAPTER_BYTES:
        raise CorruptArtifact(f"{version.name}: its files are not {' and '.join(sorted(FILES))} of a sane size")
    if Manifest("adapter", datetime.now(UTC), files).digest != version.digest:
        raise CorruptArtifact(f"{version.name}: its digest is not that of its files")


def _is_whole(folder: Path, files: tuple[AdapterFile, ...]) -> bool:
    """Whether the files are there with their hashes; counts as a use of them."""
    if not folder.is_dir() or not all(_has_hash(folder / file.path, file) for file in files):
        return False
    os.utime(folder / ADAPTER_CONFIG)
    return True


def _has_hash(path: Path, file: AdapterFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as stored:
        return hashlib.file_digest(stored, "sha256").hexdigest() == file.sha256


def _put_in_place(partial: Path, folder: Path, files: tuple[AdapterFile, ...]) -> None:
    """Another process may have been faster; what lies there broken gives way."""
    if not _is_whole(folder, files):
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _remove_oldest(newest_first: list[Path], max_bytes: int) -> None:
    kept_bytes = 0
    for folder in newest_first:
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        is_partial = folder.name.startswith(_PARTIAL)
        is_dead = is_partial and time.time() - _last_use_s(folder) > _PARTIAL_IS_DEAD_S
        if is_dead or (not is_partial and kept_bytes + size_bytes > max_bytes):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            kept_bytes += size_bytes


def _last_use_s(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.iterdir()), default=folder.stat().st_mtime)
