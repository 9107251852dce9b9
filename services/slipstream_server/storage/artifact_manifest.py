"""What an artifact is: an immutable set of named files, known by the hash of what it holds.

The digest is the SHA-256 of the canonical JSON of ``files``, ``{"path":{"sha256":"...","size_bytes":N},...}``, with
sorted keys and no spaces. Kind and time of making are told beside it and do not count: the same files are the same
artifact.

Pure data and rules; no I/O; any thread.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from slipstream_server.errors import CorruptArtifact, InvalidField, QuotaExceeded

MAX_PATH_CHARS = 255
MAX_PATH_DEPTH = 8
MAX_MANIFEST_BYTES = 64 * 1024 * 1024

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactLimits:
    """How much one artifact may hold."""

    max_file_bytes: int = 64 * 1024**3
    max_total_bytes: int = 256 * 1024**3
    max_files: int = 10_000

    def check(self, *, file_bytes: int, total_bytes: int, num_files: int) -> None:
        """Raises QuotaExceeded naming the bound that one of the numbers, announced or counted, is over."""
        for what, value, allowed in (
            ("bytes in one file", file_bytes, self.max_file_bytes),
            ("bytes in all files", total_bytes, self.max_total_bytes),
            ("files", num_files, self.max_files),
        ):
            if value > allowed:
                raise QuotaExceeded(f"{value} {what}, at most {allowed} are allowed", metadata={"limit": str(allowed)})


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one artifact by relative path, what kind of artifact it is, and when it was first made."""

    kind: str
    created: datetime
    files: Mapping[str, FileEntry]

    @property
    def digest(self) -> str:
        """64 lower-case hexadecimal digits; the artifact's name for ever."""
        return hashlib.sha256(_canonical(_entries(self.files))).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())

    def entry(self, path: str) -> FileEntry:
        """The entry of the file ``path``; raises InvalidField where there is none."""
        if path not in self.files:
            raise InvalidField.of("path", f"{path[:MAX_PATH_CHARS]!a} is not a file of this artifact")
        return self.files[path]

    def to_bytes(self) -> bytes:
        return _canonical({"files": _entries(self.files), "kind": self.kind, "created": self.created.isoformat()})

    @classmethod
    def from_bytes(cls, data: bytes, digest: str) -> Manifest:
        """The manifest in ``data``; raises CorruptArtifact unless it is well formed and has ``digest``."""
        try:
            manifest = cls._parse(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidField):
            raise CorruptArtifact(f"the manifest of artifact {digest} is damaged") from None
        if manifest.digest != digest:
            raise CorruptArtifact(f"the manifest of artifact {digest} has the digest {manifest.digest}")
        return manifest

    @classmethod
    def _parse(cls, raw: Any) -> Manifest:
        files = {
            check_path(path): FileEntry(check_sha256(entry["sha256"], "sha256"), int(entry["size_bytes"]))
            for path, entry in raw["files"].items()
        }
        return cls(check_kind(raw["kind"]), datetime.fromisoformat(raw["created"]), MappingProxyType(files))


def check_path(path: str, field: str = "path") -> str:
    """``path`` if it may name a file of an artifact; raises InvalidField for ``field`` otherwise."""
    segments = path.split("/") if len(path) <= MAX_PATH_CHARS else []
    if not 1 <= len(segments) <= MAX_PATH_DEPTH or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        shown = ascii(path[:80]) + ("..." if len(path) > 80 else "")
        raise InvalidField.of(
            field,
            f"{shown} is no relative path of 1 to {MAX_PATH_CHARS} characters, 1 to {MAX_PATH_DEPTH} segments"
            " divided by '/', each of A-Z, a-z, 0-9, '_', '.', '+', '-' and beginning with a letter, a digit or '_'",
        )
    return path


def check_sha256(value: str, field: str) -> str:
    """``value`` if it is a SHA-256 in lower-case hexadecimal; raises InvalidField for ``field`` otherwise."""
    if not _SHA256.fullmatch(value):
        raise InvalidField.of(field, f"{value[:80]!a} is not a SHA-256 of 64 lower-case hexadecimal digits")
    return value


def check_kind(value: str) -> str:
    """``value`` if it can name a kind of artifact: adapter, dataset, checkpoint, ..."""
    if not _KIND.fullmatch(value):
        raise InvalidField.of("kind", f"{value[:80]!a} is not 1 to 32 of a-z, 0-9 and '_'")
    return value


def _entries(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {path: {"sha256": entry.sha256, "size_bytes": entry.size_bytes} for path, entry in files.items()}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
