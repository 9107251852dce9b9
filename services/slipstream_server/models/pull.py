"""What ``slipstream models pull`` and ``slipstream models list`` do, without the command line. Free of torch;
blocking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from slipstream_server.models.cache import ModelCache
from slipstream_server.models.progress import ProgressCallback, ignore_progress
from slipstream_server.models.sources import PreparedModel, SourceOptions, resolve


class ModelState(StrEnum):
    AVAILABLE = "available"
    CACHED = "cached"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One line of the list; ``size_bytes`` is what lies on the disk once it does, and the catalogue's figure before."""

    name: str
    description: str
    tasks: tuple[str, ...]
    license: str
    num_parameters: int
    size_bytes: int
    state: ModelState
    source: str
    note: str


def pull(
    name: str, progress: ProgressCallback = ignore_progress, *, options: SourceOptions | None = None
) -> PreparedModel:
    """Fetch and prepare a model now, so that loading it later needs no network. ``name`` is anything ``resolve``
    understands.
    """
    return resolve(name, options=options, progress=progress)


def list_models(options: SourceOptions | None = None) -> list[ModelRow]:
    """The catalogue, by name, with what is on this machine already."""
    options = options or SourceOptions()
    return list(_rows(options, ModelCache(options.cache_root)))


def _rows(options: SourceOptions, cache: ModelCache) -> Iterator[ModelRow]:
    for name, entry in sorted(options.catalogue.entries.items()):
        pointer = cache.recall(name)
        yield ModelRow(
            name=name,
            description=entry.description,
            tasks=entry.tasks,
            license=entry.license,
            num_parameters=entry.num_parameters,
            size_bytes=_size_bytes(Path(pointer["folder"])) if pointer else entry.size_bytes,
            state=ModelState.CACHED if pointer else ModelState.AVAILABLE,
            source=pointer["source"] if pointer else str(entry.sources[0]),
            note=pointer["note"] if pointer else entry.sources[0].note,
        )


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
