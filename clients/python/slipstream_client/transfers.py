"""Files on their way: hashed, cut into chunks to send; received, checked and put in their place.

Files are read and written in blocks on threads; nothing is held whole in memory. Not known here: which service they
go to or come from.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from slipstream.type.v1 import artifact_pb2
from slipstream_client.errors import FailedPreconditionError, InvalidRequestError, ProtocolError
from slipstream_client.model_results import Progress

OnProgress = Callable[[Progress], None]
CHUNK_BYTES = 1024 * 1024
# A transfer may take as long as its bytes need; a dead connection is noticed by its pings.
TRANSFER_TIMEOUT_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A file to send: where its bytes are, and its path in the artifact."""

    path: str
    data: Path | bytes

    def open(self) -> BinaryIO:
        """Its bytes, from the first on."""
        if isinstance(self.data, bytes):
            return BytesIO(self.data)
        try:
            return self.data.open("rb")
        except OSError as error:
            raise _unreadable(self.data, error) from error

    def size_bytes(self) -> int:
        """Its length as it is now."""
        if isinstance(self.data, bytes):
            return len(self.data)
        try:
            if not self.data.is_file():
                raise InvalidRequestError.of("files", f"{str(self.data)!r} is not a file")
            return self.data.stat().st_size
        except OSError as error:
            raise _unreadable(self.data, error) from error


def _unreadable(path: Path, error: OSError) -> InvalidRequestError:
    return InvalidRequestError.of("files", f"cannot read {str(path)!r}: {error.strerror}")


class Meter:
    """Counts the bytes of one stage, and tells ``on_progress``."""

    def __init__(self, stage: str, total_bytes: int, on_progress: OnProgress | None) -> None:
        self._stage = stage
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0
        self.add(0)

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        self._done_bytes += count
        if self._on_progress is not None:
            self._on_progress(
                Progress(
                    stage=self._stage, completed_count=self._done_bytes, total_count=self._total_bytes, unit="bytes"
                )
            )


async def announce(files: Sequence[LocalFile], on_progress: OnProgress | None) -> list[artifact_pb2.ArtifactFile]:
    """Length and hash of every file: what the contract wants to know before the first byte."""
    meter = Meter("hashing", sum(file.size_bytes() for file in files), on_progress)
    return [await _announced(file, meter) for file in files]


async def _announced(file: LocalFile, meter: Meter) -> artifact_pb2.ArtifactFile:
    digest = hashlib.sha256()
    size_bytes = 0
    with file.open() as source:
        while block := await asyncio.to_thread(source.read, CHUNK_BYTES):
            await asyncio.to_thread(digest.update, block)
            size_bytes += len(block)
            meter.add(len(block))
    return artifact_pb2.ArtifactFile(path=file.path, size_bytes=size_bytes, sha256=digest.hexdigest())


async def chunks(
    files: Sequence[LocalFile], announced: Sequence[artifact_pb2.ArtifactFile], on_progress: OnProgress | None
) -> AsyncGenerator[artifact_pb2.ArtifactChunk]:
    """The bytes of the files in their order. FailedPreconditionError for one that has changed since it was hashed."""
    meter = Meter("sending", sum(file.size_bytes for file in announced), on_progress)
    for index, (file, said) in enumerate(zip(files, announced, strict=True)):
        digest = hashlib.sha256()
        offset_bytes = 0
        with file.open() as source:
            while block := await asyncio.to_thread(source.read, CHUNK_BYTES):
                digest.update(block)
                yield artifact_pb2.ArtifactChunk(file_index=index, offset_bytes=offset_bytes, data=block)
                offset_bytes += len(block)
                meter.add(len(block))
        if digest.hexdigest() != said.sha256:
            raise FailedPreconditionError(f"{file.path}: it was changed while it was being sent; send it again")


async def sha256_of(path: Path) -> str:
    """The hash of a file; empty where there is none."""
    try:
        with path.open("rb") as source:
            return (await asyncio.to_thread(hashlib.file_digest, source, "sha256")).hexdigest()
    except FileNotFoundError:
        return ""


def place_in(folder: Path, path: str) -> Path:
    """Where a file of the artifact goes. What a server says is not trusted to stay in the folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or "\0" in path or {"..", "."} & set(path.split("/")):
        raise ProtocolError(f"the server sent a file with the path {path!r}, which is not below the folder")
    return folder.joinpath(*parts)


class Arrival:
    """One file while it comes: written beside its place, hashed, and moved there once it is whole."""

    def __init__(self, said: artifact_pb2.ArtifactFile, target: BinaryIO) -> None:
        self._said = said
        self._target = target
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def write(self, chunk: artifact_pb2.ArtifactChunk) -> None:
        """Take the next bytes."""
        if chunk.offset_bytes != self._size_bytes or self._size_bytes + len(chunk.data) > self._said.size_bytes:
            raise ProtocolError(f"{self._said.path}: the server's chunks are out of order")
        self._target.write(chunk.data)
        self._digest.update(chunk.data)
        self._size_bytes += len(chunk.data)

    def check(self) -> None:
        """Raise unless every byte has come as announced."""
        if self._size_bytes != self._said.size_bytes or self._digest.hexdigest() != self._said.sha256:
            raise ProtocolError(f"{self._said.path}: the bytes that came have not the announced length and hash")
        self._target.flush()
        os.fsync(self._target.fileno())


@contextmanager
def arriving(folder: Path, said: artifact_pb2.ArtifactFile) -> Iterator[Arrival]:
    """Receive one file into ``folder``: it appears there whole and checked, or not at all."""
    place = place_in(folder, said.path)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.part")
    try:
        with beside.open("wb") as target:
            arrival = Arrival(said, target)
            yield arrival
            arrival.check()
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
