"""The front's own copy of the adapter registry: what can be served, where aliases point, each model's default.

Whoever follows the registry puts what happened in, requests are resolved from it. A change is in force when ``apply``
has returned, so that acknowledging it afterwards is true. With the registry away the copy stays as it was last. Kept in
memory alone: what a new process knows, the registry has told it. Event loop; plain code that waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from slipstream_server.errors import (
    AdapterNotFound,
    AdapterVersionNotFound,
    AliasMissing,
    AliasNotFound,
    DependencyUnavailable,
)
from slipstream_server.resource_names import LIVE, AdapterAliasName, AdapterName, AdapterVersionName
from slipstream_server.resource_names import parse_adapter_reference as parse_reference

_RETRY_AFTER_S = 2.0
_Name = TypeVar("_Name", AdapterVersionName, AdapterAliasName)
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """One file of a version. ``sha256`` in lower-case hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServableVersion:
    """An immutable version that can be served. ``digest``: 64 hexadecimal digits over its files."""

    name: AdapterVersionName
    digest: str
    files: tuple[AdapterFile, ...]
    base_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultAdapter:
    """What a model applies where a request names nothing. ``adapter`` as it was set: an alias moves on."""

    model: str
    adapter: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class VersionGone:
    """The version can not, or not any more, be served."""

    name: AdapterVersionName


@dataclass(frozen=True, slots=True)
class AliasMoved:
    """The alias is new, or points at another version."""

    name: AdapterAliasName
    version: AdapterVersionName


@dataclass(frozen=True, slots=True)
class AliasGone:
    name: AdapterAliasName


@dataclass(frozen=True, slots=True)
class AdapterKnown:
    """There is an adapter of that name, be it without versions."""

    name: AdapterName


@dataclass(frozen=True, slots=True)
class AdapterGone:
    """The adapter was deleted with everything below it."""

    name: AdapterName


Change = ServableVersion | VersionGone | AliasMoved | AliasGone | DefaultAdapter | AdapterKnown | AdapterGone


class RegistryGap(Exception):
    """An event is missing before the one that came: only a snapshot helps."""


@dataclass(slots=True)
class _Content:
    adapters: set[str] = field(default_factory=set)
    versions: dict[AdapterVersionName, ServableVersion] = field(default_factory=dict)
    aliases: dict[AdapterAliasName, AdapterVersionName] = field(default_factory=dict)
    defaults: dict[str, DefaultAdapter] = field(default_factory=dict)


class RegistryCopy:
    """The registry as of event ``sequence``; 0 before the first snapshot."""

    def __init__(self) -> None:
        self.sequence = 0
        self._content: _Content | None = None

    @property
    def is_filled(self) -> bool:
        """Whether there has been a snapshot."""
        return self._content is not None

    def replace(self, sequence: int, changes: Iterable[Change]) -> None:
        """Forget everything and take a snapshot, given as what would have led to it."""
        content = _Content()
        for change in changes:
            _put(content, change)
        self._content, self.sequence = content, sequence

    def apply(self, events: Iterable[tuple[int, Change]]) -> None:
        """Take events in the order of their numbers; known ones are skipped. Raises RegistryGap."""
        for sequence, change in events:
            if sequence <= self.sequence:
                continue
            if self._content is None or sequence != self.sequence + 1:
                raise RegistryGap(f"event {sequence} after {self.sequence}")
            _put(self._content, change)
            self.sequence = sequence

    def default_of(self, model: str) -> str:
        """The adapter that ``model`` applies where a request names none; empty for its base."""
        default = self._content.defaults.get(model) if self._content is not None else None
        return default.adapter if default is not None and default.enabled else ""

    def find(self, reference: str, field: str = "adapter") -> ServableVersion:
        """The version that ``reference`` (a short form or a full name) means now.

        Raises InvalidField, AdapterNotFound, AdapterVersionNotFound, AliasNotFound, AliasMissing for a bare name
        without ``live``, and DependencyUnavailable while nothing is known.
        """
        name = parse_reference(reference, field)
        if self._content is None:
            raise DependencyUnavailable(
                f"{field}: the adapter registry has not answered since this service started; requests without an"
                " adapter are served",
                metadata={"dependency": "adapters"},
                retry_after_s=_RETRY_AFTER_S,
            )
        if name.adapter not in self._content.adapters:
            raise AdapterNotFound(f"no adapter {name.adapter!r}", metadata={"adapter": name.adapter})
        version = name if isinstance(name, AdapterVersionName) else self._pointed_at(self._content, name, reference)
        found = self._content.versions.get(version)
        if found is None:
            raise AdapterVersionNotFound(
                f"adapter {version.adapter!r} has no version {version.version} that can be served",
                metadata={"adapter": version.adapter, "version": version.version},
            )
        return found

    def _pointed_at(self, content: _Content, name: AdapterAliasName, reference: str) -> AdapterVersionName:
        if (version := content.aliases.get(name)) is not None:
            return version
        if name.alias == LIVE and reference in (name.adapter, str(AdapterName(name.adapter))):
            raise AliasMissing(
                f"{name.adapter!r} means {name.adapter}@{LIVE}, and there is no such alias; name a version or set the"
                " alias"
            )
        raise AliasNotFound(f"adapter {name.adapter!r} has no alias {name.alias!r}")


def _put(content: _Content, change: Change) -> None:
    match change:
        case ServableVersion():
            content.adapters.add(change.name.adapter)
            content.versions[change.name] = change
        case VersionGone(name):
            content.versions.pop(name, None)
        case AliasMoved(name, version):
            content.adapters.add(name.adapter)
            content.aliases[name] = version
        case AliasGone(name):
            content.aliases.pop(name, None)
        case DefaultAdapter():
            content.defaults[change.model] = change
        case AdapterKnown(name):
            content.adapters.add(name.adapter)
        case AdapterGone(name):
            content.adapters.discard(name.adapter)
            content.versions = _without(content.versions, name.adapter)
            content.aliases = _without(content.aliases, name.adapter)


def _without(entries: Mapping[_Name, _Value], adapter: str) -> dict[_Name, _Value]:
    return {name: value for name, value in entries.items() if name.adapter != adapter}
