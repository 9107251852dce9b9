"""Finds the configuration, or the tokenizer, that a request names, without fetching any weights.

    models/tiny, tiny            a model that the service knows
    smollm2-135m-instruct        an entry of the catalogue
    my-folder                    a folder in one of the configured roots
    org/name[@revision]          a hub id

Free of torch; blocking (a hub is asked for small files); any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream_server.errors import DependencyUnavailable, InvalidField, ModelNotFound, PermissionDenied
from slipstream_server.models.cache import ModelCache
from slipstream_server.models.catalogue import CatalogueEntry, HubSource
from slipstream_server.models.folder import CODE_FILES, FAST_TOKENIZER, SLOW_TOKENIZER_FILES, is_plain_name, read_json
from slipstream_server.models.hub import HubSnapshot, fetch_snapshot, parse_hub_id
from slipstream_server.models.parameters import count_parameters_of
from slipstream_server.models.progress import ignore_progress
from slipstream_server.models.sources import SourceOptions, resolve

_MODELS = "models/"
_MAX_SPEC_CHARS = 1024
TOKENIZER_FILES = frozenset(
    {
        FAST_TOKENIZER,
        *SLOW_TOKENIZER_FILES,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    }
)
PROCESSOR_FILES = frozenset(name for name in CODE_FILES if name not in ("config.json", "tokenizer_config.json"))

KnownFolder = Callable[[str], Path | None]
"""The prepared folder of a model that the service knows, by its id; None where there is none, or no files yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundConfiguration:
    """``name`` is portable, never a path. ``folder`` has at least config.json, and no weights where they are not here
    (``is_local``); None where the configuration is the catalogue's own.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None
    is_local: bool
    entry: CatalogueEntry | None = None
    revision: str = ""


class Configurations:
    """Looks in all the places. ``options.allowed_roots`` are the roots whose folders may be named."""

    def __init__(self, options: SourceOptions, known: KnownFolder) -> None:
        self._options = options
        self._known = known

    def find(self, spec: str, field: str, revision: str = "", *, shape_only: bool = False) -> FoundConfiguration:
        """The configuration of ``spec``; with ``shape_only`` what the catalogue says of a model's shape will do.

        Raises InvalidField, ModelNotFound, PermissionDenied, DependencyUnavailable, CorruptArtifact.
        """
        _check_spec(spec, field)
        if (folder := self._known(spec.removeprefix(_MODELS))) is not None:
            _refuse_revision(revision, field)
            return _local(spec.removeprefix(_MODELS), folder, self._entry(spec.removeprefix(_MODELS)))
        if spec.startswith(_MODELS):
            raise ModelNotFound(f"{field}: no model {spec[:80]!a}, or its files are not here yet")
        if (entry := self._entry(spec)) is not None:
            _refuse_revision(revision, field)
            return self._of_entry(entry, shape_only=shape_only)
        if (folder := self._in_roots(spec)) is not None:
            _refuse_revision(revision, field)
            return _local(spec, folder)
        return self._of_hub(spec, field, revision)

    def tokenizer_folder(self, spec: str, field: str) -> Path:
        """A folder whose tokenizer is that of ``spec``; raises InvalidField where it has none."""
        found = self.find(spec, field)
        if found.folder is not None and tokenizer_files(found.folder):
            return found.folder
        if found.entry is not None:
            folder = self._fetched_tokenizer(found.entry)
            if tokenizer_files(folder):
                return folder
        raise InvalidField.of(field, f"{found.name[:80]!a} has no tokenizer")

    def _entry(self, name: str) -> CatalogueEntry | None:
        return self._options.catalogue.get(name) if name in self._options.catalogue else None

    def _of_entry(self, entry: CatalogueEntry, *, shape_only: bool) -> FoundConfiguration:
        pointer = ModelCache(self._options.cache_root).recall(entry.name)
        if pointer is not None:
            return _local(entry.name, Path(pointer["folder"]), entry)
        if shape_only and count_parameters_of(entry.config) is not None:
            return FoundConfiguration(name=entry.name, config=entry.config, folder=None, is_local=False, entry=entry)
        reasons: list[str] = []
        for source in entry.sources:
            if isinstance(source, HubSource):
                try:
                    return self._fetched(entry.name, source.repository, source.revision, entry)
                except (DependencyUnavailable, ModelNotFound, PermissionDenied) as error:
                    reasons.append(error.message)
        raise DependencyUnavailable(
            f"model {entry.name}: its configuration cannot be had now: {'; '.join(reasons) or 'no hub has it'}",
            retry_after_s=30.0,
        )

    def _fetched_tokenizer(self, entry: CatalogueEntry) -> Path:
        """From a hub, a few files; from a package, the whole model, which other uses then find here."""
        for source in entry.sources:
            if isinstance(source, HubSource):
                try:
                    return self._snapshot(source.repository, source.revision).folder
                except (DependencyUnavailable, ModelNotFound, PermissionDenied):
                    continue
        return resolve(entry.name, options=self._options).folder

    def _in_roots(self, name: str) -> Path | None:
        """A folder that lies in a root itself, by its name; a link must not lead out of the roots."""
        if not is_plain_name(name):
            return None
        roots = [root.resolve() for root in self._options.allowed_roots or ()]
        for root in roots:
            folder = (root / name).resolve()
            if (folder / "config.json").is_file() and any(folder.is_relative_to(inside) for inside in roots):
                return folder
        return None

    def _of_hub(self, spec: str, field: str, revision: str) -> FoundConfiguration:
        hub_id = parse_hub_id(f"{spec}@{revision}" if revision else spec)
        if hub_id is None:
            raise ModelNotFound(f"{field}: {spec[:80]!a} is no model, catalogue entry, folder or hub id (org/name)")
        return self._fetched(hub_id[0], *hub_id)

    def _fetched(
        self, name: str, repository: str, revision: str, entry: CatalogueEntry | None = None
    ) -> FoundConfiguration:
        snapshot = self._snapshot(repository, revision)
        is_local = any(snapshot.folder.glob("*.safetensors"))
        config = read_json(snapshot.folder / "config.json")
        return FoundConfiguration(
            name=name,
            config=config,
            folder=snapshot.folder,
            is_local=is_local,
            entry=entry,
            revision=snapshot.revision,
        )

    def _snapshot(self, repository: str, revision: str) -> HubSnapshot:
        return fetch_snapshot(repository, revision, self._options.hub, ignore_progress, tokenizer_only=True)


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the tokenizer's files in a folder; none where there is no tokenizer."""
    names = sorted(path.name for path in folder.iterdir() if path.name in TOKENIZER_FILES)
    return names if {FAST_TOKENIZER, *SLOW_TOKENIZER_FILES} & {*names} - {"tokenizer_config.json"} else []


def _local(name: str, folder: Path, entry: CatalogueEntry | None = None) -> FoundConfiguration:
    config = read_json(folder / "config.json")
    return FoundConfiguration(name=name, config=config, folder=folder, is_local=True, entry=entry)


def _refuse_revision(revision: str, field: str) -> None:
    if revision:
        raise InvalidField.of("revision", f"only hub ids have revisions; {field} is none")


def _check_spec(spec: str, field: str) -> None:
    if not 0 < len(spec) <= _MAX_SPEC_CHARS or not spec.isprintable():
        raise InvalidField.of(field, f"{spec[:50]!a} must be 1 to {_MAX_SPEC_CHARS} printable characters")
