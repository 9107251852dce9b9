"""Brings a stored model's files to this machine and into their prepared form, at low priority, telling how far it is.

Threads of its own do the work: blocking, for minutes where something is downloaded. A fetch that nobody waits for any
more ends at its next report. Event loop, but for those threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from slipstream_server.errors import CorruptArtifact, UnsafeWeights
from slipstream_server.inference.model_places import check_local_folder
from slipstream_server.inference.model_records import NewModel, StoredModel
from slipstream_server.models.cache import ModelCache
from slipstream_server.models.facts import ModelFacts, read_facts
from slipstream_server.models.folder import check_model_folder
from slipstream_server.models.model_card import licence_of
from slipstream_server.models.priority import lower_thread
from slipstream_server.models.progress import PullProgress
from slipstream_server.models.sources import PreparedModel, SourceOptions, require_files_below, resolve

_MAX_FETCHES = 2

Report = Callable[[PullProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What a prepared folder tells without being loaded."""

    facts: ModelFacts
    disk_bytes: int
    licence: str


class ModelFetcher:
    """Fetches by the operator's rules: what clients name below ``roots`` only, what we made below ``own_root``."""

    def __init__(
        self, options: SourceOptions, *, roots: tuple[Path, ...], own_root: Path, tokenizer: str | None = None
    ) -> None:
        self._options = options
        self.roots = roots
        self.own_root = own_root
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(_MAX_FETCHES, thread_name_prefix="fetch", initializer=lower_thread)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, record: StoredModel, report: Report) -> tuple[PreparedModel, ModelFiles]:
        """The prepared folder and its facts. ``report`` is called on the event loop. Raises what ``resolve`` does."""
        loop, is_wanted = asyncio.get_running_loop(), threading.Event()
        is_wanted.set()

        def on_progress(progress: PullProgress) -> None:
            if not is_wanted.is_set():
                raise _Abandoned
            loop.call_soon_threadsafe(report, progress)

        try:
            return await loop.run_in_executor(self._threads, self._fetch, record, on_progress)
        finally:
            is_wanted.clear()

    async def at_hand(self, model: NewModel) -> tuple[PreparedModel, ModelFiles] | None:
        """As ``fetch``, from what is on this machine and prepared already; None where that is nothing.

        Raises UnsafeWeights, CorruptArtifact or PermissionDenied for a folder that could never be loaded.
        """
        return await asyncio.to_thread(self._at_hand, model)

    async def look_into(self, folder: Path) -> ModelFiles | None:
        """What a prepared folder tells; None where it is gone, or not what it was."""
        with contextlib.suppress(CorruptArtifact, UnsafeWeights, OSError):
            return await asyncio.get_running_loop().run_in_executor(self._threads, _files_in, folder)
        return None

    def _fetch(self, record: StoredModel, on_progress: Report) -> tuple[PreparedModel, ModelFiles]:
        prepared = resolve(record.locator, tokenizer=self._tokenizer, options=self._rules(record), progress=on_progress)
        return prepared, _files_in(prepared.folder)

    def _rules(self, record: NewModel) -> SourceOptions:
        if record.owns_folder:
            return replace(self._options, allowed_roots=(self.own_root,))
        return replace(self._options, allowed_roots=None if record.by_operator else self.roots)

    def _at_hand(self, model: NewModel) -> tuple[PreparedModel, ModelFiles] | None:
        folder = check_local_folder(model.locator)
        if folder is not None and (roots := self._rules(model).allowed_roots) is not None:
            require_files_below(folder, roots)
        folder = folder or self._known_folder(model)
        if folder is None or not check_model_folder(folder).is_prepared:
            return None
        prepared = PreparedModel(name=model.id, folder=folder, source=model.source, revision=model.revision)
        return prepared, _files_in(folder)

    def _known_folder(self, model: NewModel) -> Path | None:
        if model.folder and Path(model.folder, "config.json").is_file():
            return Path(model.folder)
        pointer = ModelCache(self._options.cache_root).recall(model.locator) if "/" not in model.locator else None
        return Path(pointer["folder"]) if pointer else None


def _files_in(folder: Path) -> ModelFiles:
    sizes = (path.stat().st_size for path in folder.iterdir() if path.is_file())
    return ModelFiles(facts=read_facts(folder), disk_bytes=sum(sizes), licence=licence_of(folder))


class _Abandoned(Exception):
    """Nobody waits for this fetch any more."""
