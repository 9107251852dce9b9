"""Takes the files of a dataset as they arrive and makes an artifact of them, or nothing.

What is announced is judged before a byte is read; chunks come in the order of the announcement, each file whole and
with the announced hash. Event loop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from slipstream_server.errors import CorruptArtifact, InvalidField, UnsupportedField
from slipstream_server.storage.artifact_drafts import Artifact
from slipstream_server.storage.artifact_manifest import ArtifactLimits, check_path, check_sha256
from slipstream_server.storage.artifacts import ArtifactStore
from slipstream_server.training.resources import FileOfDataset, as_json

KIND = "dataset"
MAX_CHUNK_BYTES = 4 * 1024 * 1024
MAX_FILES = 256
READABLE = ".jsonl"
_CONTRACT_ENDINGS = frozenset({".json", ".csv", ".tsv", ".parquet", ".txt"})
_SPLIT = re.compile(r"[a-z0-9]([-_a-z0-9]{0,61}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes of the announced file ``file_index``, from ``offset_bytes`` on."""

    file_index: int
    offset_bytes: int
    data: bytes


class DatasetIntake:
    """Receives datasets into one store."""

    def __init__(self, store: ArtifactStore, max_bytes: int) -> None:
        self._store = store
        self._limits = ArtifactLimits(max_file_bytes=max_bytes, max_total_bytes=max_bytes, max_files=MAX_FILES)

    def check_announced(self, files: Sequence[FileOfDataset], field: str = "header.files") -> None:
        """Raises InvalidField, UnsupportedField or QuotaExceeded for files that cannot be taken."""
        if not 1 <= len(files) <= MAX_FILES:
            raise InvalidField.of(field, f"{len(files)} files; 1 to {MAX_FILES} are allowed")
        for index, file in enumerate(files):
            _check_file(file, f"{field}[{index}]")
        if len({file.path for file in files}) < len(files):
            raise InvalidField.of(field, "names a file twice")
        self._limits.check(
            file_bytes=max(file.size_bytes for file in files),
            total_bytes=sum(file.size_bytes for file in files),
            num_files=len(files),
        )

    async def receive(self, files: Sequence[FileOfDataset], chunks: AsyncIterator[Chunk]) -> Artifact:
        """Store ``files``, whose bytes come in ``chunks``.

        Raises what ``check_announced`` does, InvalidField for chunks out of order, CorruptArtifact for other bytes than
        announced, StorageFull.
        """
        self.check_announced(files)
        async with self._store.draft(KIND, self._limits) as draft:
            for index, file in enumerate(files):
                async with draft.file(file.path, sha256=file.sha256, size_bytes=file.size_bytes) as stored:
                    position = 0
                    while position < file.size_bytes:
                        chunk = await anext(chunks, None)
                        if chunk is None:
                            raise CorruptArtifact(
                                f"{file.path!r} was announced with {file.size_bytes} bytes, {position} arrived"
                            )
                        _check_place(chunk, index, position)
                        await stored.write(chunk.data)
                        position += len(chunk.data)
            if await anext(chunks, None) is not None:
                raise InvalidField.of("chunk", "comes after the last byte of the last file")
            return await draft.commit()


def dataset_digest(files: Sequence[FileOfDataset], wanted_format: str) -> str:
    """SHA-256 over the files and how they are read, in hexadecimal."""
    return hashlib.sha256(as_json([files, wanted_format]).encode()).hexdigest()


def _check_file(file: FileOfDataset, field: str) -> None:
    check_path(file.path, f"{field}.file.path")
    check_sha256(file.sha256, f"{field}.file.sha256")
    if file.size_bytes < 0:
        raise InvalidField.of(f"{field}.file.size_bytes", f"{file.size_bytes} is below 0")
    if not _SPLIT.fullmatch(file.split[:64]):
        raise InvalidField.of(f"{field}.split", f"{file.split[:64]!a} is not 1 to 63 of a-z, 0-9, '-' and '_'")
    ending = PurePosixPath(file.path).suffix
    if ending in _CONTRACT_ENDINGS:
        raise UnsupportedField.of(f"{field}.file.path", f"{ending} files are not read by this build; send {READABLE}")
    if ending != READABLE:
        raise InvalidField.of(f"{field}.file.path", f"{file.path[:80]!a} does not end with {READABLE}")


def _check_place(chunk: Chunk, index: int, position: int) -> None:
    if (chunk.file_index, chunk.offset_bytes) != (index, position):
        raise InvalidField.of(
            "chunk",
            f"is for file {chunk.file_index} at byte {chunk.offset_bytes}; file {index} at byte {position} is next",
        )
    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
        raise InvalidField.of("chunk.data", f"has {len(chunk.data)} bytes; 1 to {MAX_CHUNK_BYTES} are allowed")
