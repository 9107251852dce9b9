"""Batches cut into parts that run at once: nothing is lost, mixed up or left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.inference.engine.side_by_side import SideBySide, _parts
from slipstream_server.tasks.runner import Piece


class Doubling:
    """Notes who ran which part, with how many threads; all parts of one batch must be there at once."""

    def __init__(self, num_parts: int = 1, failing: int | None = None) -> None:
        self.passes: list[tuple[int, tuple[int, ...]]] = []
        self._failing = failing
        self._meeting = threading.Barrier(num_parts)

    def run(self, pieces: Sequence[Piece]) -> list[int]:
        assert torch.is_inference_mode_enabled()
        self._meeting.wait(timeout=20)
        if any(piece.payload == self._failing for piece in pieces):
            raise RuntimeError("poisoned")
        self.passes.append((torch.get_num_threads(), tuple(piece.payload for piece in pieces)))
        return [2 * piece.payload for piece in pieces]

    def prepare(self, *arguments: Any) -> Any: ...

    def finish(self, *arguments: Any) -> Any: ...


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(number)


def pieces_of(*sizes: int) -> list[Piece]:
    return [Piece(size=size, payload=place) for place, size in enumerate(sizes)]


def test_halves_run_at_once_on_one_thread_each() -> None:
    runner = Doubling(num_parts=2)
    assert SideBySide().run(runner, pieces_of(50, 50, 60, 70)) == [0, 2, 4, 6]
    assert sorted(runner.passes) == [(1, (0, 1)), (1, (2, 3))]


@pytest.mark.parametrize("sizes", [(500,), (10, 20, 30)], ids=["one text", "a small batch"])
def test_what_cannot_be_halved_with_profit_is_run_by_all_threads(sizes: tuple[int, ...]) -> None:
    runner = Doubling()
    assert SideBySide().run(runner, pieces_of(*sizes)) == [2 * place for place in range(len(sizes))]
    assert runner.passes == [(2, tuple(range(len(sizes))))]


def test_a_single_text_after_halves_has_all_threads_again() -> None:
    side_by_side = SideBySide()
    side_by_side.run(Doubling(num_parts=2), pieces_of(100, 100))
    runner = Doubling()
    side_by_side.run(runner, pieces_of(200))
    assert runner.passes == [(2, (0,))]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_raised_when_the_other_part_is_done(failing: int) -> None:
    runner = Doubling(num_parts=2, failing=failing)
    with pytest.raises(RuntimeError, match="poisoned"):
        SideBySide().run(runner, pieces_of(100, 100))
    assert [payloads for _, payloads in runner.passes] == [(1 - failing,)]


@given(sizes=st.lists(st.integers(1, 512), min_size=1, max_size=64), number=st.integers(1, 8))
def test_parts_are_the_whole_in_order_and_about_even(sizes: list[int], number: int) -> None:
    pieces = pieces_of(*sorted(sizes))
    parts = _parts(pieces, number)
    assert [piece for part in parts for piece in part] == pieces
    assert all(parts)
    assert len(parts) <= number
    assert max(sum(piece.size for piece in part) for part in parts) < sum(sizes) / number + max(sizes) + 1
