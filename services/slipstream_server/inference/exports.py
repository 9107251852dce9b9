"""Gives a model's files away: as they are stored, or written anew with an adapter merged, another type, other shards.

What is written anew lies below ``root`` for as long as its reader reads it, and no longer; what a crash left there is
removed at the next start. Few exports run at once, few more wait. Torch lives in a subprocess. Event loop; hashing and
reading run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from slipstream_server.errors import CorruptArtifact, InvalidField, OutOfMemory, QueueFull, UnsupportedField
from slipstream_server.inference.generation import AdapterPin
from slipstream_server.models.cache import require_free_bytes, storage_errors
from slipstream_server.models.configurations import PROCESSOR_FILES, TOKENIZER_FILES
from slipstream_server.models.estimate import DTYPE_BYTES
from slipstream_server.models.facts import ModelFacts
from slipstream_server.models.folder import WEIGHTS_INDEX, check_model_folder
from slipstream_server.models.tool_process import ReportProgress, ToolProgress, run_tool

CHUNK_BYTES = 1024 * 1024
DEFAULT_SHARD_BYTES = 4 * 1024**3
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 1024**2, 50 * 1024**3
_EXPORT_TIMEOUT_S = 4 * 3600.0
_MAX_AT_ONCE = 2
_MAX_WAITING = 8
_PROCESS_BYTES = 500 * 1024**2
_HASHED_BYTES = 16 * 1024**2
_PARTIAL = "export-"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to give away. ``data_type`` empty: as stored. ``adapter`` is merged into the weights."""

    model: str
    folder: Path
    facts: ModelFacts
    adapter: AdapterPin | None = None
    data_type: str = ""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def check(self) -> None:
        """Refuse what no export could be. Raises InvalidField or UnsupportedField."""
        if not MIN_SHARD_BYTES <= self.max_shard_bytes <= MAX_SHARD_BYTES:
            raise InvalidField.of(
                "max_shard_bytes", f"{self.max_shard_bytes} is not from {MIN_SHARD_BYTES} to {MAX_SHARD_BYTES}"
            )
        if self.data_type and self.data_type not in DTYPE_BYTES:
            raise InvalidField.of("data_type", f"{self.data_type} is not one of {', '.join(DTYPE_BYTES)}")
        if self.facts.is_quantized and (self.adapter is not None or self.data_type):
            what = "adapter" if self.adapter is not None else "data_type"
            raise UnsupportedField.of(
                what, f"the stored weights are quantized ({self.facts.quantization_method}); they leave as they are"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file: its name within the export, where it lies, and what it holds."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


class Exports:
    """The exports of one service, in ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._gate = asyncio.Semaphore(_MAX_AT_ONCE)
        self._num_waiting = 0

    def tidy(self) -> None:
        """Remove what a crash left. Blocking; at start only."""
        with contextlib.suppress(FileNotFoundError):
            for leftover in self._root.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    @asynccontextmanager
    async def open(self, request: ExportRequest, report: ReportProgress) -> AsyncIterator[list[ExportedFile]]:
        """The files, hashed and in order; they stay until the block is left, however it is left.

        Raises InvalidField, UnsupportedField, QueueFull, OutOfMemory, StorageFull, IncompatibleAdapter,
        CorruptArtifact or ModelLoadFailed.
        """
        request.check()
        async with self._turn(report):
            if await asyncio.to_thread(_leaves_as_stored, request):
                yield await _hashed(_stored_files(request.folder), report)
                return
            folder = await asyncio.to_thread(self._place, request)
            try:
                await self._write(request, folder, report)
                yield await _hashed(_new_files(request.folder, folder), report)
            finally:
                await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    @asynccontextmanager
    async def _turn(self, report: ReportProgress) -> AsyncIterator[None]:
        if self._gate.locked():
            if self._num_waiting >= _MAX_WAITING:
                raise QueueFull(f"{_MAX_AT_ONCE} exports run and {_MAX_WAITING} wait already", retry_after_s=30.0)
            report(ToolProgress(stage="waiting"))
        self._num_waiting += 1
        try:
            await self._gate.acquire()
        finally:
            self._num_waiting -= 1
        try:
            yield
        finally:
            self._gate.release()

    def _place(self, request: ExportRequest) -> Path:
        """An empty folder on a disk that has room for the files."""
        require_free_bytes(self._root, _new_bytes(request))
        _require_memory(request)
        with storage_errors():
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._root))

    async def _write(self, request: ExportRequest, folder: Path, report: ReportProgress) -> None:
        await run_tool(
            "export",
            {
                "source": str(request.folder),
                "target": str(folder),
                "adapter": request.adapter.folder if request.adapter else "",
                "dtype": request.data_type or request.facts.dtype,
                "max_shard_bytes": request.max_shard_bytes,
            },
            timeout_s=_EXPORT_TIMEOUT_S,
            report=report,
        )


async def chunks_of(file: ExportedFile) -> AsyncGenerator[tuple[int, bytes], None]:
    """Offset and bytes; raises CorruptArtifact for a file that is not what was hashed any more."""
    digest, offset = hashlib.sha256(), 0
    with await asyncio.to_thread(file.path.open, "rb") as source:

        def next_block() -> bytes:
            block = source.read(CHUNK_BYTES)
            digest.update(block)
            return block

        while block := await asyncio.to_thread(next_block):
            yield offset, block
            offset += len(block)
    if digest.hexdigest() != file.sha256:
        raise CorruptArtifact(f"{file.name}: was changed while it was being sent")


def _leaves_as_stored(request: ExportRequest) -> bool:
    """Whether the stored files are what is asked for: no adapter, the same type, no shard over the limit."""
    if request.adapter is not None or request.data_type not in ("", request.facts.dtype):
        return False
    contents = check_model_folder(request.folder)
    sizes = [(request.folder / name).stat().st_size for name in contents.weight_files]
    return request.facts.is_quantized or max(sizes) <= request.max_shard_bytes


def _stored_files(folder: Path) -> list[tuple[str, Path]]:
    contents = check_model_folder(folder)
    index = [WEIGHTS_INDEX] if len(contents.weight_files) > 1 or (folder / WEIGHTS_INDEX).is_file() else []
    return _described(folder, ("config.json", "generation_config.json", *index, *contents.weight_files))


def _new_files(source: Path, written: Path) -> list[tuple[str, Path]]:
    """What was written, and the tokenizer and processor as they are stored."""
    names = {path.name for path in written.iterdir() if path.is_file()}
    kept = [(name, path) for name, path in _described(source, ()) if name not in names]
    return sorted([(name, written / name) for name in names] + kept)


def _described(folder: Path, names: tuple[str, ...]) -> list[tuple[str, Path]]:
    wanted = {*names, *TOKENIZER_FILES, *PROCESSOR_FILES}
    return [(path.name, path) for path in sorted(folder.iterdir()) if path.name in wanted and path.is_file()]


async def _hashed(files: list[tuple[str, Path]], report: ReportProgress) -> list[ExportedFile]:
    total = sum(path.stat().st_size for _, path in files)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        loop.call_soon_threadsafe(report, ToolProgress(stage="hashing", done=done, total=total, unit="bytes"))

    loop = asyncio.get_running_loop()
    return [await asyncio.to_thread(_hashed_file, name, path, count) for name, path in files]


def _hashed_file(name: str, path: Path, count: Callable[[int], None]) -> ExportedFile:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source:
        while block := source.read(_HASHED_BYTES):
            digest.update(block)
            size += len(block)
            count(len(block))
    return ExportedFile(name=name, path=path, size_bytes=size, sha256=digest.hexdigest())


def _new_bytes(request: ExportRequest) -> int:
    return request.facts.num_parameters * DTYPE_BYTES[request.data_type or request.facts.dtype]


def _require_memory(request: ExportRequest) -> None:
    """A merge holds the weights in float32 at least, and their cast copy layer by layer."""
    dtype = request.data_type or request.facts.dtype
    element_bytes = max(4, DTYPE_BYTES[dtype]) if request.adapter is not None else DTYPE_BYTES[dtype]
    needed, left = request.facts.num_parameters * element_bytes + _PROCESS_BYTES, psutil.virtual_memory().available
    if needed > left:
        raise OutOfMemory(
            f"exporting model {request.model} needs {needed} bytes of memory, {left} are free",
            metadata={"needed_bytes": str(needed), "left_bytes": str(left)},
        )
