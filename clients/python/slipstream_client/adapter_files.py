"""The files of an adapter version: what of a folder is sent, and how a download is received."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Sequence
from pathlib import Path

from slipstream.adapters.v1 import adapter_service_pb2 as adapter_pb2
from slipstream.type.v1 import artifact_pb2
from slipstream_client.adapter_results import ArtifactFile
from slipstream_client.errors import InvalidRequestError, ProtocolError
from slipstream_client.transfers import LocalFile, Meter, OnProgress, arriving, place_in, sha256_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def files_to_send(folder: Path) -> list[LocalFile]:
    """The two files of a saved adapter; refused by name where one is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            unsafe = any(folder.glob("adapter_model.bin")) and name == WEIGHTS
            why = "; save it with safe_serialization=True, .bin files are not taken" if unsafe else ""
            raise InvalidRequestError.of("folder", f"{str(folder)!r} has no {name}{why}")
    return [LocalFile(path=name, data=folder / name) for name in (CONFIG, WEIGHTS)]


async def present_paths(folder: Path, files: Sequence[ArtifactFile]) -> list[str]:
    """The files that lie in ``folder`` already with the right hash."""
    return [file.path for file in files if await sha256_of(place_in(folder, file.path)) == file.sha256]


async def receive(
    responses: AsyncIterator[adapter_pb2.DownloadAdapterResponse],
    folder: Path,
    skipped: Container[str],
    on_progress: OnProgress | None,
) -> None:
    """Put every file of a download into ``folder``."""
    first = await anext(responses, None)
    if first is None or not first.HasField("header"):
        raise ProtocolError("the download did not begin with its header")
    files = [(index, said) for index, said in enumerate(first.header.version.files) if said.path not in skipped]
    meter = Meter("receiving", sum(said.size_bytes for _, said in files), on_progress)
    chunk = await _next_chunk(responses)
    for index, said in files:
        with arriving(folder, said) as arrival:
            while chunk is not None and chunk.file_index == index:
                arrival.write(chunk)
                meter.add(len(chunk.data))
                chunk = await _next_chunk(responses)
    if chunk is not None:
        raise ProtocolError(f"the server sent bytes of file {chunk.file_index} out of order")


async def _next_chunk(
    responses: AsyncIterator[adapter_pb2.DownloadAdapterResponse],
) -> artifact_pb2.ArtifactChunk | None:
    response = await anext(responses, None)
    if response is None:
        return None
    if not response.HasField("chunk"):
        raise ProtocolError("the download has a message without a chunk")
    return response.chunk
