"""Where a client says that a model comes from, checked: a catalogue entry, a hub id, or a folder in a model root.

A client never names a path outside the roots, and nothing outside them is looked at. Free of torch. Looks at the disk;
any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream_server.errors import InvalidField, ModelNotFound, PermissionDenied
from slipstream_server.models.catalogue import Catalogue, builtin_catalogue
from slipstream_server.models.folder import ADAPTER_CONFIG, check_model_folder, is_plain_name
from slipstream_server.models.hub import parse_hub_id

_MAX_SOURCE_CHARS = 512
_MAX_REVISION_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """``source`` as clients see it, ``locator`` as ``models.sources`` resolves it."""

    source: str
    locator: str


def client_place(source: str, revision: str, roots: tuple[Path, ...], catalogue: Catalogue | None = None) -> Place:
    """The place that a client named. Raises InvalidField, ModelNotFound or PermissionDenied; nothing is fetched."""
    for name, value, limit in (("source", source, _MAX_SOURCE_CHARS), ("revision", revision, _MAX_REVISION_CHARS)):
        if len(value) > limit or not (value.isprintable() and value.isascii()):
            raise InvalidField.of(name, f"{value[:60]!a} is not at most {limit} printable ASCII characters")
    if "/" in source and not source.startswith(("/", ".", "~")):
        return _on_hub(source, revision)
    if revision:
        raise InvalidField.of("revision", f"{revision[:60]!a} is given, and {source[:60]!a} is no hub id (org/name)")
    if source in (catalogue or builtin_catalogue()):
        return Place(source=source, locator=source)
    return _in_a_root(source, roots)


def operator_place(spec: str) -> Place:
    """The place that the operator's own flags name; anything ``models.sources`` understands."""
    is_name = spec in builtin_catalogue() or (not Path(spec).exists() and "/" in spec.strip("/"))
    is_name = is_name and not Path(spec).is_absolute()
    return Place(source=spec.partition("@")[0] if is_name else Path(spec).name, locator=spec)


def check_local_folder(locator: str) -> Path | None:
    """The model folder at ``locator``, looked into; None where it is no folder of this machine, or an adapter's.

    Raises UnsafeWeights or CorruptArtifact.
    """
    folder = Path(locator)
    if not folder.is_absolute() or not folder.is_dir() or (folder / ADAPTER_CONFIG).is_file():
        return None
    check_model_folder(folder)
    return folder


def _on_hub(source: str, revision: str) -> Place:
    locator = f"{source}@{revision}" if revision else source
    if "@" in source or parse_hub_id(locator) is None:
        raise InvalidField.of("source", f"{source[:100]!a} is no hub id (org/name), catalogue entry or folder's name")
    return Place(source=source, locator=locator)


def _in_a_root(source: str, roots: tuple[Path, ...]) -> Place:
    """A folder (or a .gguf file) directly in one of the roots, by its name or by its whole path."""
    if not source.startswith("/") and not is_plain_name(source):
        raise InvalidField.of("source", f"{source[:100]!a} is no hub id (org/name), catalogue entry or folder's name")
    for root in roots:
        # Joined with a whole path, the root itself drops out; what counts is where it ends up.
        path = (root / source).resolve()
        is_within = path.is_relative_to(root.resolve()) and path != root.resolve()
        if is_within and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
            return Place(source=str(path.relative_to(root.resolve())), locator=str(path))
    if source.startswith("/"):
        raise PermissionDenied("source: a local path outside the folders that this server allows for models")
    raise ModelNotFound(
        f"source: {source[:100]!a} is no entry of the catalogue and no folder in this service's model roots",
        metadata={"source": source[:100]},
    )
