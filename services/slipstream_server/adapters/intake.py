"""Takes the files of an adapter as they arrive and makes a checked artifact of them, or nothing.

What is announced is judged before a byte is read, the header of the weights as soon as it is complete, everything else
before the artifact is committed. The configuration that is stored is the canonical one (``configuration``): it names
the base as the registry does and never a place on somebody's disk. Event loop; parsing runs in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from slipstream_server.adapters import configuration, inspection
from slipstream_server.adapters.inspection import AdapterFacts
from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter, InvalidField, UnsafeWeights
from slipstream_server.models.safetensors_header import TensorEntry, header_length, parse_header
from slipstream_server.resource_names import ModelName
from slipstream_server.storage.artifact_drafts import Artifact, ArtifactDraft
from slipstream_server.storage.artifact_manifest import ArtifactLimits, check_path, check_sha256
from slipstream_server.storage.artifacts import ArtifactStore

KIND = "adapter"
FILES = (configuration.FILE, inspection.FILE)
MAX_CHUNK_BYTES = 4 * 1024 * 1024
LIMITS = ArtifactLimits(max_file_bytes=8 * 1024**3, max_total_bytes=8 * 1024**3, max_files=len(FILES))

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".h5", ".msgpack"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedFile:
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes of the announced file ``file_index``, from ``offset_bytes`` on."""

    file_index: int
    offset_bytes: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """Which base an adapter is for: what its bringer ``said``, what the registry ``expected``; empty: nothing."""

    said: str = ""
    said_revision: str = ""
    expected: str = ""

    def chosen(self, configured: str) -> str:
        """The base of an adapter whose configuration names ``configured``.

        Raises InvalidField where nobody names one, IncompatibleAdapter where it is not the expected one.
        """
        base = self.said or ("" if configuration.is_path(configured) else configured) or self.expected
        if not base:
            raise InvalidField.of(
                "header.base_model", "is needed: adapter_config.json names no base model, or a place on a disk"
            )
        if self.expected and base != self.expected:
            raise IncompatibleAdapter(
                f"the adapter is for the base {base[:200]!a}; this one's versions are for {self.expected!a}"
            )
        return base


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A checked adapter in the store, to which no row refers yet."""

    artifact: Artifact
    facts: AdapterFacts


class Intake:
    """Receives adapters into one store."""

    def __init__(self, store: ArtifactStore, limits: ArtifactLimits = LIMITS) -> None:
        self._store = store
        self._limits = limits

    def check_announced(self, files: Sequence[AnnouncedFile], field: str = "header.files") -> None:
        """Raises InvalidField, UnsafeWeights or QuotaExceeded for files that cannot be taken."""
        for index, file in enumerate(files):
            where = f"{field}[{index}]"
            _check_name(file.path, f"{where}.path")
            check_sha256(file.sha256, f"{where}.sha256")
            if file.size_bytes < 1:
                raise InvalidField.of(f"{where}.size_bytes", f"{file.size_bytes} is not 1 or more")
        if sorted(file.path for file in files) != sorted(FILES):
            raise InvalidField.of(field, f"must be {' and '.join(FILES)}, each once")
        self._limits.check(
            file_bytes=max(file.size_bytes for file in files),
            total_bytes=sum(file.size_bytes for file in files),
            num_files=len(files),
        )

    async def receive(self, files: Sequence[AnnouncedFile], chunks: AsyncIterator[Chunk], base: BaseModel) -> Received:
        """The adapter in ``files``, whose bytes come in ``chunks``: checked and stored.

        Raises what ``check_announced`` does, InvalidField for chunks out of order, CorruptArtifact for other bytes than
        announced, UnsafeWeights, IncompatibleAdapter, StorageFull.
        """
        self.check_announced(files)
        incoming = _Incoming(files, chunks)
        async with self._store.draft(KIND, self._limits) as draft:
            for index, file in enumerate(files):
                if file.path == configuration.FILE:
                    parsed = configuration.parse(await _configuration(file, incoming.of(index)))
                else:
                    tensors = await _weights(draft, file, incoming.of(index))
            await incoming.expect_end()
            parsed = replace(
                parsed,
                base_model=base.chosen(parsed.base_model),
                base_model_revision=base.said_revision or parsed.base_model_revision,
            )
            facts = await asyncio.to_thread(inspection.inspect, parsed, tensors)
            async with draft.file(configuration.FILE) as stored:
                await stored.write(configuration.canonical_bytes(facts.configuration))
            return Received(artifact=await draft.commit(), facts=facts)


def check_base_name(name: str, field: str) -> str:
    """``name`` if it can name a base: "models/{model}", a hub id, a catalogue name, or nothing. Raises InvalidField."""
    if name.startswith("models/"):
        ModelName.parse(name, field)
    elif len(name) > configuration.MAX_BASE_NAME_CHARS or not name.isprintable() or configuration.is_path(name):
        raise InvalidField.of(field, f"{name[:80]!a} is neither models/{{model}} nor the name of a source")
    return name


def _check_name(path: str, field: str) -> None:
    check_path(path, field)
    if PurePosixPath(path).suffix in _PICKLES:
        raise UnsafeWeights(f"{field}: {path!a}: only safetensors are taken, never pickled or other weights")
    if path not in FILES:
        raise InvalidField.of(field, f"{path!a} is not one of {', '.join(FILES)}")


class _Incoming:
    """Chunks in the order of the announcement; anything else is refused where it appears."""

    def __init__(self, files: Sequence[AnnouncedFile], chunks: AsyncIterator[Chunk]) -> None:
        self._files = files
        self._chunks = chunks

    async def of(self, index: int) -> AsyncGenerator[bytes, None]:
        """The bytes of file ``index``, exactly as many as announced."""
        file, position = self._files[index], 0
        while position < file.size_bytes:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                raise CorruptArtifact(f"{file.path!r} was announced with {file.size_bytes} bytes, {position} arrived")
            _check_place(chunk, index, position)
            position += len(chunk.data)
            if position > file.size_bytes:
                raise CorruptArtifact(f"{file.path!r} was announced with {file.size_bytes} bytes, more arrived")
            yield chunk.data

    async def expect_end(self) -> None:
        if await anext(self._chunks, None) is not None:
            raise InvalidField.of("chunk", "comes after the last byte of the last file")


def _check_place(chunk: Chunk, index: int, position: int) -> None:
    if (chunk.file_index, chunk.offset_bytes) != (index, position):
        raise InvalidField.of(
            "chunk",
            f"is for file {chunk.file_index} at byte {chunk.offset_bytes}; file {index} at byte {position} is next",
        )
    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
        raise InvalidField.of("chunk.data", f"has {len(chunk.data)} bytes; 1 to {MAX_CHUNK_BYTES} are allowed")


async def _configuration(file: AnnouncedFile, chunks: AsyncGenerator[bytes, None]) -> bytes:
    if file.size_bytes > configuration.MAX_BYTES:
        raise CorruptArtifact(
            f"{file.path}: announced with {file.size_bytes} bytes; at most {configuration.MAX_BYTES} are read"
        )
    async with aclosing(chunks):
        raw = b"".join([data async for data in chunks])
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != file.sha256:
        raise CorruptArtifact(f"{file.path!r} was announced with the SHA-256 {file.sha256}, but has {sha256}")
    return raw


async def _weights(
    draft: ArtifactDraft, file: AnnouncedFile, chunks: AsyncGenerator[bytes, None]
) -> Mapping[str, TensorEntry]:
    head = _Head(file)
    async with aclosing(chunks), draft.file(file.path, sha256=file.sha256, size_bytes=file.size_bytes) as stored:
        async for data in chunks:
            await head.take(data)
            await stored.write(data)
    return head.tensors()


class _Head:
    """Catches the header of a safetensors file that passes by, and judges it as soon as it is whole."""

    def __init__(self, file: AnnouncedFile) -> None:
        self._file = file
        self._bytes = bytearray()
        self._length: int | None = None
        self._tensors: Mapping[str, TensorEntry] | None = None

    async def take(self, data: bytes) -> None:
        if self._tensors is not None:
            return
        self._bytes += data
        if self._length is None and len(self._bytes) >= 8:
            self._length = header_length(self._file.path, bytes(self._bytes[:8]), self._file.size_bytes)
        if self._length is not None and len(self._bytes) >= 8 + self._length:
            header = bytes(self._bytes[8 : 8 + self._length])
            self._bytes.clear()
            self._tensors = await asyncio.to_thread(parse_header, self._file.path, header, self._file.size_bytes)

    def tensors(self) -> Mapping[str, TensorEntry]:
        if self._tensors is None:
            raise CorruptArtifact(
                f"{self._file.path}: {self._file.size_bytes} bytes are too few for a safetensors file"
            )
        return self._tensors
