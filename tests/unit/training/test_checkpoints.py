"""Checkpoints: only what is whole, unaltered and of the same recipe counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream_server.training.checkpoints import (
    MARKER,
    complete_checkpoint,
    discard_after,
    discard_unmarked,
    keep_newest,
    last_complete_checkpoint,
    list_checkpoint_folders,
)

RECIPE = "a" * 64


def make(folder: Path, step: int, *, is_complete: bool = True, recipe: str = RECIPE) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"state" * step)
    (path / "training_args.bin").write_bytes(b"a pickle")
    if is_complete:
        complete_checkpoint(path, recipe_digest=recipe)
    return path


def last_step(folder: Path) -> int | None:
    checkpoint = last_complete_checkpoint(folder, recipe_digest=RECIPE)
    return checkpoint and checkpoint.step


def test_newest_by_number_is_found(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make(tmp_path, step)
    assert last_step(tmp_path) == 100


def test_no_folder_and_no_checkpoint_are_none(tmp_path: Path) -> None:
    assert last_step(tmp_path / "none") is None
    make(tmp_path, 5, is_complete=False)
    assert last_step(tmp_path) is None


def truncate(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(b"state")


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "optimizer.pt").read_bytes())
    content[3] ^= 1
    (path / "optimizer.pt").write_bytes(content)


def add_a_file(path: Path) -> None:
    (path / "rng_state_1.pth").write_bytes(b"from elsewhere")


def link_elsewhere(path: Path) -> None:
    target = path.rename(path.with_name("elsewhere"))
    path.symlink_to(target)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        add_a_file,
        link_elsewhere,
        lambda path: (path / "optimizer.pt").unlink(),
        lambda path: (path / MARKER).unlink(),
        lambda path: (path / MARKER).write_bytes(b"{"),
        lambda path: (path / MARKER).write_bytes((path / MARKER).read_bytes()[:-5]),
        lambda path: path.rename(path.with_name("checkpoint-30")),
    ],
    ids=["truncated", "bit", "added", "link", "lacks a file", "no marker", "broken marker", "cut marker", "renamed"],
)
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make(tmp_path, 10)
    damage(make(tmp_path, 20))
    assert last_step(tmp_path) == 10


def test_checkpoint_of_another_recipe_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, recipe="b" * 64)
    assert last_step(tmp_path) == 10


def test_digest_is_that_of_the_marker_and_pickles_of_objects_are_gone(tmp_path: Path) -> None:
    path = make(tmp_path, 10)
    checkpoint = last_complete_checkpoint(tmp_path, recipe_digest=RECIPE)
    assert checkpoint is not None
    assert checkpoint.digest == hashlib.sha256((path / MARKER).read_bytes()).hexdigest()
    assert {entry.name for entry in path.iterdir()} == {"optimizer.pt", MARKER}


def test_tidying_removes_what_it_says(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    make(tmp_path, 5, is_complete=False)
    discard_unmarked(tmp_path)
    keep_newest(tmp_path, 3)
    assert [path.name for path in list_checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    discard_after(tmp_path, 2)
    assert [path.name for path in list_checkpoint_folders(tmp_path)] == ["checkpoint-2"]
