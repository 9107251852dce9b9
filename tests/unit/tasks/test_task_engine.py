"""The task engine with runners of plain Python: one terminal event each, failures alone, order kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.tasks.driving import answers, drain, until

from slipstream_server.errors import InvalidField
from slipstream_server.inference.engine.tasks import TaskEngine
from slipstream_server.inference.generation import Admitted, Failed, Finished, TaskResults
from slipstream_server.tasks.batching import TaskLimits
from slipstream_server.tasks.items import ItemError, SimilarityResult, TaskInput, TaskRequest, TextInput
from slipstream_server.tasks.runner import Piece

LIMITS = TaskLimits(max_batch_size=8, max_batch_tokens=64, max_queue_delay_ms=0)


class Lengths:
    """Gives the length of each word; some words are poison at one stage or another."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        assert isinstance(item, TextInput)
        if item.text == "unprepared":
            raise InvalidField.of("text", "is not to be prepared")
        return [Piece(size=len(word), payload=word) for word in item.text.split()]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        words = [str(piece.payload) for piece in pieces]
        self.batches.append(words)
        if "poison" in words:
            raise RuntimeError("poison")
        if "large" in words and len(words) > 1:
            raise MemoryError
        return [float(len(word)) for word in words]

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> SimilarityResult:
        assert isinstance(item, TextInput)
        if "unfinished" in item.text:
            raise ValueError("unfinished")
        return SimilarityResult(list(raw))


def request(request_id: int, *texts: str, **rest: Any) -> TaskRequest:
    return TaskRequest(id=request_id, task="lengths", inputs=tuple(map(TextInput, texts)), **rest)


def engine_of(runner: Lengths, **rest: Any) -> TaskEngine:
    return TaskEngine({"lengths": runner}, LIMITS, run=lambda runner, pieces: runner.run(pieces), **rest)


@pytest.fixture
def runner() -> Lengths:
    return Lengths()


@pytest.fixture
def engine(runner: Lengths) -> Iterator[TaskEngine]:
    engine = engine_of(runner, counting_tasks=frozenset({"lengths"}))
    yield engine
    engine.close()


WORDS = ["a", "bbb", "ccccccc", "poison", "large", "unprepared", "unfinished", "d" * 40, ""]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.lists(st.sampled_from(WORDS), max_size=5), max_size=20), min_size=1, max_size=8))
def test_every_input_is_answered_once_and_right_and_failures_stay_alone(wanted: list[list[list[str]]]) -> None:
    engine = engine_of(Lengths())
    asked = [request(number, *(" ".join(words) for words in texts)) for number, texts in enumerate(wanted)]
    found = answers(engine, asked)
    engine.close()
    for one in asked:
        assert len(found[one.id]) == len(one.inputs)
        for item, result in zip(one.inputs, found[one.id], strict=True):
            assert isinstance(item, TextInput)
            words = item.text.split()
            if item.text == "unprepared" or "poison" in words or "unfinished" in words:
                assert isinstance(result, ItemError)
                assert result.reason == ("INVALID_FIELD" if item.text == "unprepared" else "INTERNAL")
            else:
                assert result == SimilarityResult([float(len(word)) for word in words])


def test_pieces_of_different_requests_share_a_batch(engine: TaskEngine, runner: Lengths) -> None:
    for number in range(6):
        engine.submit(request(number, "abc"))
    until(lambda: len(engine._side._ready) == 6)
    drain(engine)
    assert max(map(len, runner.batches)) > 1


def test_tokens_are_counted_and_the_request_is_admitted_before_its_results(engine: TaskEngine) -> None:
    engine.submit(request(1, "abc de", "f"))
    events = [event for event in drain(engine) if isinstance(event, Admitted | TaskResults | Finished)]
    assert isinstance(events[0], Admitted)
    assert isinstance(events[-1], Finished)
    assert sum(event.num_tokens for event in events if isinstance(event, TaskResults)) == 6


def test_a_cancelled_request_says_nothing_more(engine: TaskEngine, runner: Lengths) -> None:
    engine.submit(request(1, *["word"] * 100))
    engine.submit(request(2, "other"))
    engine.step()
    engine.cancel(1)
    engine.cancel(77)
    num_batches = len(runner.batches)
    events = drain(engine)
    assert {event.id for event in events if isinstance(event, Finished | Failed | TaskResults)} == {2}
    assert all("word" not in batch for batch in runner.batches[num_batches:])


def test_a_request_past_its_deadline_fails_once_as_a_whole(engine: TaskEngine) -> None:
    engine.submit(request(1, "late", deadline_monotonic_s=time.monotonic() - 1))
    ends = [event for event in drain(engine) if isinstance(event, Finished | Failed)]
    assert [(type(end), end.id) for end in ends] == [(Failed, 1)]
    assert isinstance(ends[0], Failed)
    assert ends[0].reason == "DEADLINE_EXCEEDED"


def test_a_task_that_the_worker_does_not_do_fails_naming_what_it_does(engine: TaskEngine) -> None:
    engine.submit(TaskRequest(id=1, task="fill-mask", inputs=(TextInput("x"),)))
    failed = [event for event in drain(engine) if isinstance(event, Failed)]
    assert failed[0].reason == "UNSUPPORTED_FIELD"
    assert "lengths" in failed[0].message


def test_waking_tells_the_owner_that_a_step_is_due(runner: Lengths) -> None:
    import threading

    woken = threading.Event()
    engine = engine_of(runner, wake=woken.set)
    engine.submit(request(1, "abc"))
    assert woken.wait(10.0)
    drain(engine)
    engine.close()
