"""Where the files of one job lie, and how a file is written so that it is there whole or not at all.

    recipe.json            what to do; written by the supervisor
    events-<attempt>.jsonl the spool of each attempt
    checkpoints/           checkpoint-<step>/
    adapter/               the trained adapter, once result.json is there
    result.json            the outcome; written last

Plain paths and blocking writes; any thread.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec


class FileDigest(msgspec.Struct, frozen=True, kw_only=True):
    """A file within a folder, by name, with what it must hold."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The paths of one job below ``path``."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def events(self, attempt: int) -> Path:
        return self.path / f"events-{attempt}.jsonl"


def digest_file(path: Path) -> FileDigest:
    """Name, size and SHA-256 of ``path``."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(name=path.name, size_bytes=file.tell(), sha256=sha256)


def digest_folder(folder: Path, *, leave_out: Iterable[str] = ()) -> tuple[FileDigest, ...]:
    """Every file directly in ``folder``, by name."""
    skipped = set(leave_out)
    return tuple(digest_file(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in skipped)


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` durably: readers see the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Force the files directly in ``folder``, and their names, to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
