"""Collection of artifacts that nothing refers to, and the policy of what to keep.

The database is the truth: the caller says which digests its rows refer to. Everything younger than the grace period
stays, because its row may be on its way; so a writer has that long from its first byte to its row, and a row that
begins to refer to an old artifact is preceded by ``store.touch()``. Manifests go first, then the blobs that no
remaining manifest names, then what dead writers left in staging; a crash in between leaves garbage for the next time,
never an artifact without its bytes.

Runs as a task of the service that owns the store, its blocking work in the store's threads.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from slipstream_server.errors import CorruptArtifact, InvalidField, NotFound
from slipstream_server.storage.artifact_drafts import blob_key
from slipstream_server.storage.artifacts import ArtifactStore

DEFAULT_GRACE = timedelta(hours=24)

References = Callable[[], Awaitable[AbstractSet[str]]]
"""Reads from the database which digests are referred to, now."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one collection removed."""

    artifacts: int
    blobs: int
    leftovers: int


async def collect(store: ArtifactStore, references: References, grace: timedelta = DEFAULT_GRACE) -> Collected:
    """Remove what is older than ``grace`` and not referred to: artifacts, blobs, leftovers. Safe beside writers.

    Raises CorruptArtifact, having removed no blob, where a manifest that must stay cannot be read: its blobs are
    unknown.
    """
    if grace < timedelta(0):
        raise InvalidField.of("grace", f"{grace} is below 0")
    before_s = time.time() - grace.total_seconds()
    artifacts = await _collect_manifests(store, references, before_s)
    blobs = await _collect_blobs(store, before_s)
    leftovers = await store.threads.run(_remove_leftovers, store.place.staging, before_s)
    if artifacts or blobs or leftovers:
        logger.info("collected %s artifacts, %s blobs, %s unfinished uploads", artifacts, blobs, leftovers)
    return Collected(artifacts=artifacts, blobs=blobs, leftovers=leftovers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Keep the newest ``keep_last``, and all that are younger than ``younger_than``; what fails both may go."""

    keep_last: int
    younger_than: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        if self.keep_last < 0:
            raise InvalidField.of("keep_last", f"{self.keep_last} is below 0")
        if self.younger_than < timedelta(0):
            raise InvalidField.of("younger_than", f"{self.younger_than} is below 0")

    def expired(self, items: Iterable[T], made: Callable[[T], datetime], now: datetime) -> Sequence[T]:
        """The ``items`` that may go, oldest first."""
        newest_first = sorted(items, key=made, reverse=True)
        return [item for item in reversed(newest_first[self.keep_last :]) if now - made(item) >= self.younger_than]


async def _collect_manifests(store: ArtifactStore, references: References, before_s: float) -> int:
    referenced = await references()
    doomed = await _old_keys(store, "manifests", before_s, keep=referenced)
    # Read again at the last moment: a row may have been written since.
    referenced = await references() if doomed else referenced
    return await _delete(store, [key for key in doomed if _name(key) not in referenced], before_s)


async def _collect_blobs(store: ArtifactStore, before_s: float) -> int:
    # Old blobs are listed before manifests are read: a manifest that comes later has renewed its blobs, and the place
    # looks again.
    old = await _old_keys(store, "blobs", before_s, keep=frozenset())
    named: set[str] = set()
    for digest in await store.digests() if old else ():
        try:
            named |= {blob_key(entry.sha256) for entry in (await store.manifest(digest)).files.values()}
        except NotFound:
            continue
        except CorruptArtifact:
            logger.error(
                "the manifest of artifact %s is damaged: no blob is collected until it is mended or removed", digest
            )
            raise
    return await _delete(store, [key for key in old if key not in named], before_s)


async def _old_keys(store: ArtifactStore, prefix: str, before_s: float, keep: AbstractSet[str]) -> list[str]:
    listed = await store.threads.run(lambda: list(store.place.listed(prefix)))
    return [stored.key for stored in listed if stored.modified_s < before_s and _name(stored.key) not in keep]


async def _delete(store: ArtifactStore, keys: Iterable[str], before_s: float) -> int:
    return sum([await store.threads.run(store.place.delete_if_older, key, before_s) for key in keys])


def _remove_leftovers(staging: Path, before_s: float) -> int:
    old = [entry for entry in staging.iterdir() if _last_written_s(entry) < before_s]
    for entry in old:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return len(old)


def _last_written_s(entry: Path) -> float:
    try:
        return max(file.lstat().st_mtime for file in (entry, *entry.rglob("*")))
    except FileNotFoundError:
        return time.time()  # its writer is at work on it


def _name(key: str) -> str:
    return key.rpartition("/")[2]
