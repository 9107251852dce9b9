"""Drives a task engine without a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from slipstream_server.inference.engine.tasks import TaskEngine
from slipstream_server.inference.generation import Event, Failed, Finished, TaskResults
from slipstream_server.tasks.items import TaskRequest, TaskResult

_TIMEOUT_S = 60.0


def drain(engine: TaskEngine) -> list[Event]:
    """Step until nothing is left to do; all events."""
    events: list[Event] = []
    limit = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < limit:
        events += engine.step()
        engine.check_integrity()
        wait_s = engine.wait_s()
        if wait_s is None and not engine._live:
            return events
        due_s = limit if wait_s is None else time.monotonic() + wait_s
        until(lambda due_s=due_s: engine.wait_s() == 0.0 or time.monotonic() >= due_s)
    raise AssertionError("the engine does not come to an end")


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < limit, "it did not come true in time"
        time.sleep(0.0005)


def answers(engine: TaskEngine, requests: Sequence[TaskRequest]) -> dict[int, list[TaskResult]]:
    """The results of all requests, run together, in the order of their inputs."""
    for request in requests:
        engine.submit(request)
    events = drain(engine)
    found: dict[int, dict[int, TaskResult]] = {request.id: {} for request in requests}
    ends = [event.id for event in events if isinstance(event, Finished | Failed)]
    assert sorted(ends) == sorted(found), "not every request ends once"
    for event in events:
        if isinstance(event, TaskResults):
            for index, result in zip(event.indices, event.results, strict=True):
                assert index not in found[event.id], "an input has two results"
                found[event.id][index] = result
    return {request_id: [results[index] for index in sorted(results)] for request_id, results in found.items()}
