"""Which checkpoints of a job are complete, and therefore fit to go on from.

A checkpoint is a folder ``checkpoint-<step>`` whose marker, written last, holds the hash of every other file. Without
its marker, with another recipe's, or with a file missing, altered or added, it does not count: a kill, a full disk or a
flipped bit costs the steps since the one before, never more. Nothing here opens a checkpoint's files as anything but
bytes. Torch-free, blocking; any thread.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slipstream_server.training.job_folder import FileDigest, digest_folder, sync_files, sync_folder, write_atomically

MARKER = "complete.json"
_MAX_MARKER_BYTES = 1024 * 1024
_NAME = re.compile(r"checkpoint-([1-9][0-9]{0,9})")
# Written by the trainer, needed by nobody, and a pickle of a whole object: it has no place in a store that is only read
# as data.
_UNWANTED_FILES = ("training_args.bin", "README.md")


class Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``complete.json`` says."""

    step: int
    recipe_digest: str
    files: tuple[FileDigest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteCheckpoint:
    """A checkpoint whose files are what its marker says. ``digest`` is the SHA-256 of the marker, so of all."""

    step: int
    path: Path
    digest: str
    size_bytes: int


def complete_checkpoint(path: Path, *, recipe_digest: str) -> CompleteCheckpoint:
    """Seal the finished folder ``path``: its files are forced to the disk before the marker that vouches for them is
    written.
    """
    for name in _UNWANTED_FILES:
        (path / name).unlink(missing_ok=True)
    sync_files(path)
    marker = Marker(step=_step(path), recipe_digest=recipe_digest, files=digest_folder(path, leave_out=[MARKER]))
    content = msgspec.json.encode(marker)
    write_atomically(path / MARKER, content)
    sync_folder(path.parent)
    return _checkpoint(path, marker, content)


def verify_checkpoint(path: Path, *, recipe_digest: str) -> CompleteCheckpoint | None:
    """The checkpoint in ``path``, every byte checked; None where it is not complete or belongs to another recipe."""
    try:
        content = _read_marker(path)
        marker = msgspec.json.decode(content, type=Marker)
        holds = {file.name for file in marker.files} | {MARKER} == {entry.name for entry in path.iterdir()}
        is_ours = marker.step == _step(path) and marker.recipe_digest == recipe_digest
        if holds and is_ours and digest_folder(path, leave_out=[MARKER]) == marker.files:
            return _checkpoint(path, marker, content)
    except (OSError, msgspec.DecodeError):
        pass
    return None


def last_complete_checkpoint(folder: Path, *, recipe_digest: str) -> CompleteCheckpoint | None:
    """The newest checkpoint below ``folder`` that is complete, passing over those that are not."""
    for path in reversed(list_checkpoint_folders(folder)):
        if checkpoint := verify_checkpoint(path, recipe_digest=recipe_digest):
            return checkpoint
    return None


def list_checkpoint_folders(folder: Path) -> Sequence[Path]:
    """The checkpoint folders below ``folder``, complete or not, in order of their steps."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _is_checkpoint(path)), key=_step)


def discard_after(folder: Path, step: int) -> None:
    """Remove every checkpoint folder of a later step: incomplete ones, and what an abandoned line of training left."""
    for path in list_checkpoint_folders(folder):
        if _step(path) > step:
            _discard(path)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the ``count`` newest checkpoint folders."""
    for path in list_checkpoint_folders(folder)[:-count]:
        _discard(path)


def discard_unmarked(folder: Path) -> None:
    """Remove folders without a marker: what a write that failed left behind, and the space it takes."""
    for path in list_checkpoint_folders(folder):
        if not (path / MARKER).exists():
            _discard(path)


def _discard(path: Path) -> None:
    """The marker goes first, so that a removal cut short leaves nothing that looks complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _is_checkpoint(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _read_marker(path: Path) -> bytes:
    with (path / MARKER).open("rb") as file:
        return file.read(_MAX_MARKER_BYTES)


def _checkpoint(path: Path, marker: Marker, content: bytes) -> CompleteCheckpoint:
    size = sum(file.size_bytes for file in marker.files) + len(content)
    return CompleteCheckpoint(step=marker.step, path=path, digest=hashlib.sha256(content).hexdigest(), size_bytes=size)
