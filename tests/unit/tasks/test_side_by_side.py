"""Batches cut into parts that run at once: nothing is lost, mixed up or left running."""

from __future__ import annotations

import ast
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, BigBirdConfig, LlamaConfig

from slipstream_server.inference.engine.side_by_side import _UNCHANGING, SideBySide, _parts, may_run_side_by_side
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


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "task", "may"),
    [
        (BertConfig(**SMALL), "feature-extraction", True),
        (BertConfig(**SMALL), "table-question-answering", False),
        (LlamaConfig(**SMALL), "feature-extraction", True),
        (LlamaConfig(**SMALL, rope_parameters=DYNAMIC), "feature-extraction", False),
        (BigBirdConfig(**SMALL), "feature-extraction", False),
    ],
    ids=["bert", "a task that writes", "llama", "frequencies that change", "a type that is not known"],
)
def test_passes_that_could_disturb_each_other_are_not_run_at_once(config: Any, task: str, may: bool) -> None:
    assert may_run_side_by_side(AutoModel.from_config(config), [task]) is may


@pytest.mark.parametrize("model_type", sorted(_UNCHANGING))
def test_the_known_types_keep_nothing_of_a_batch(model_type: str) -> None:
    """Read in their source: no forward assigns to its module, but for what training needs to know of labels."""
    assert _kept_by_forward(model_type) <= {"self.config.problem_type"}


def test_a_type_that_keeps_something_is_found_out() -> None:
    assert "self.attention_type" in _kept_by_forward("big_bird", methods=("set_attention_type",))
    assert _kept_by_forward("clvp") >= {"self.cached_sequence_length"}


def _kept_by_forward(model_type: str, methods: tuple[str, ...] = ("forward",)) -> set[str]:
    """The targets within ``self`` of every assignment in the methods of the type's modules."""
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "models" / model_type.replace("-", "_").removesuffix("_text")
    (source,) = folder.glob(f"modeling_{folder.name}.py")
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in methods:
            for each in ast.walk(node):
                is_stored = isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
                if is_stored and (target := ast.unparse(each)).startswith("self."):
                    found.add(target)
    return found
