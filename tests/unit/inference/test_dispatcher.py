"""Every request ends exactly once, whatever workers do."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream_server.errors import DeadlineExceeded, InternalError, SlipstreamError, WorkerDied
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.dispatcher import Dispatcher, Ticket
from slipstream_server.inference.generation import (
    Admitted,
    Beams,
    Cancel,
    Command,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    Sampling,
    Stopping,
    Submit,
    Tokens,
)


class Sink:
    def __init__(self) -> None:
        self.ends: list[SlipstreamError | None] = []
        self.num_tokens = 0

    def admitted(self, event: Admitted) -> None: ...
    def prompt_logprobs(self, event: PromptLogprobs) -> None: ...

    def tokens(self, event: Tokens) -> bool:
        assert not self.ends
        self.num_tokens += len(event.token_ids)
        return False

    def finished(self) -> None:
        self.ends.append(None)

    def fail(self, error: SlipstreamError) -> None:
        self.ends.append(error)


def ticket(request_id: int, sequences: int = 1, num_beams: int = 1) -> tuple[Ticket, Sink]:
    request = GenerationRequest(
        id=request_id,
        prompt_token_ids=(1,),
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=5),
        num_return_sequences=sequences,
        beams=Beams(num_beams=num_beams),
    )
    sink = Sink()
    return Ticket(request=request, sink=sink), sink


class Line:
    """The wire to a worker."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def __call__(self, command: Command) -> None:
        self.commands.append(command)

    @property
    def submitted(self) -> list[int]:
        return [command.request.id for command in self.commands if isinstance(command, Submit)]


def dispatcher(max_rows: int = 4) -> Dispatcher:
    return Dispatcher(limits=AdmissionLimits(), max_rows=max_rows)


def test_no_more_rows_than_credit_go_to_the_worker() -> None:
    busy, line = dispatcher(max_rows=4), Line()
    busy.connect(line)
    for request_id in range(6):
        busy.submit(ticket(request_id, sequences=2)[0])
    assert line.submitted == [0, 1]
    busy.handle(Finished(0))
    assert line.submitted == [0, 1, 2]


def test_a_request_larger_than_the_credit_runs_alone() -> None:
    busy, line = dispatcher(max_rows=4), Line()
    busy.connect(line)
    busy.submit(ticket(1, sequences=16)[0])
    busy.submit(ticket(2)[0])
    assert line.submitted == [1]


def test_searches_beside_the_batch_take_no_rows_and_wait_for_each_other_alone() -> None:
    busy, line = dispatcher(max_rows=4), Line()
    busy.connect(line, searches_beside=True)
    for request_id in range(5):
        busy.submit(ticket(request_id, num_beams=16)[0])
    for request_id in range(5, 10):
        busy.submit(ticket(request_id)[0])
    assert line.submitted == [0, 1, 5, 6, 7, 8]
    busy.handle(Finished(1))
    assert line.submitted == [0, 1, 5, 6, 7, 8, 2]
    busy.handle(Finished(6))
    assert line.submitted[-1] == 9
    busy.check_integrity()


def test_searches_in_the_batch_take_its_rows() -> None:
    busy, line = dispatcher(max_rows=4), Line()
    busy.connect(line)
    busy.submit(ticket(1, num_beams=4)[0])
    busy.submit(ticket(2)[0])
    assert line.submitted == [1]


def test_a_failure_reaches_the_caller_as_the_worker_told_it() -> None:
    busy = dispatcher()
    asking, sink = ticket(1)
    busy.connect(Line())
    busy.submit(asking)
    told = Failed(1, "INTERNAL", "broken, see ab12", metadata={"error_id": "ab12"})
    busy.handle(msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=Failed))
    (error,) = sink.ends
    assert isinstance(error, InternalError)
    assert (error.message, error.metadata) == ("broken, see ab12", {"error_id": "ab12"})


def test_a_death_requeues_what_had_no_token_once_and_fails_the_rest() -> None:
    busy, line = dispatcher(), Line()
    started, waiting = ticket(1), ticket(2)
    busy.connect(line)
    busy.submit(started[0])
    busy.submit(waiting[0])
    busy.handle(Tokens(1, 0, [5]))
    busy.disconnect()
    assert isinstance(started[1].ends[0], WorkerDied)
    assert waiting[1].ends == []
    busy.connect(again := Line())
    assert again.submitted == [2]
    busy.disconnect()
    assert isinstance(waiting[1].ends[0], WorkerDied)
    busy.check_integrity()


def test_suspects_go_to_the_new_worker_one_at_a_time() -> None:
    busy = dispatcher()
    innocent, poison, late = ticket(1), ticket(2), ticket(3)
    busy.connect(Line())
    busy.submit(innocent[0])
    busy.submit(poison[0])
    busy.disconnect()
    busy.submit(late[0])
    busy.connect(line := Line())
    assert line.submitted == [1]
    busy.handle(Tokens(1, 0, [5]))
    assert line.submitted == [1, 2]
    busy.handle(Finished(1))
    busy.disconnect()
    assert innocent[1].ends == [None]
    assert isinstance(poison[1].ends[0], WorkerDied)
    busy.connect(line := Line())
    assert line.submitted == [3]


def test_a_search_that_has_begun_fails_with_its_worker_and_keeps_nobody_waiting() -> None:
    busy = dispatcher()
    begun, lying_ready, late = ticket(1, num_beams=4), ticket(2, num_beams=4), ticket(3)
    busy.connect(Line(), searches_beside=True)
    busy.submit(begun[0])
    busy.submit(lying_ready[0])
    busy.handle(Admitted(1))
    busy.disconnect()
    assert isinstance(begun[1].ends[0], WorkerDied)
    busy.submit(late[0])
    busy.connect(line := Line(), searches_beside=True)
    assert line.submitted == [2]
    # Its tokens come at its end, which may be long.
    busy.handle(Admitted(2))
    assert line.submitted == [2, 3]
    busy.check_integrity()


def test_a_deadline_in_the_queue_never_reaches_the_worker() -> None:
    busy = dispatcher()
    late, sink = ticket(1)
    busy.submit(late)
    busy.expire(late)
    busy.connect(line := Line())
    assert line.commands == []
    assert isinstance(sink.ends[0], DeadlineExceeded)


def test_an_overdue_request_is_not_dispatched_though_its_timer_is_late() -> None:
    busy, line = dispatcher(), Line()
    late, sink = ticket(1)
    late.request = msgspec.structs.replace(late.request, deadline_monotonic_s=time.monotonic() - 1)
    busy.connect(line)
    busy.submit(late)
    assert line.commands == []
    assert [type(end) for end in sink.ends] == [DeadlineExceeded]
    busy.check_integrity()


def test_a_withdrawn_request_is_cancelled_in_the_worker() -> None:
    busy, line = dispatcher(), Line()
    running, sink = ticket(1)
    busy.connect(line)
    busy.submit(running)
    busy.withdraw(running)
    busy.withdraw(running)
    assert line.commands[1:] == [Cancel(1)]
    busy.handle(Finished(1))
    assert sink.ends == []


def test_an_error_in_one_request_leaves_the_others_alone() -> None:
    class Broken(Sink):
        def tokens(self, event: Tokens) -> bool:
            raise ValueError("bug")

    busy, line = dispatcher(), Line()
    bad, good = ticket(1), ticket(2)
    bad[0].sink = broken = Broken()
    busy.connect(line)
    busy.submit(bad[0])
    busy.submit(good[0])
    busy.handle(Tokens(1, 0, [5]))
    busy.handle(Tokens(2, 0, [5]))
    assert broken.ends[0] is not None
    assert broken.ends[0].reason == "INTERNAL"
    assert "bug" not in broken.ends[0].message
    assert Cancel(1) in line.commands
    assert good[1].num_tokens == 1


actions = st.sampled_from(["submit", "admit", "tokens", "finish", "fail", "die", "connect", "withdraw", "expire"])


@given(st.lists(st.tuples(actions, st.integers(0, 7)), max_size=80))
@settings(max_examples=300, deadline=None)
def test_every_request_ends_exactly_once(steps: list[tuple[str, int]]) -> None:
    busy, line = dispatcher(max_rows=3), Line()
    tickets: dict[int, tuple[Ticket, Sink]] = {}
    withdrawn: set[int] = set()
    is_up = False

    def act(action: str, key: int) -> None:
        nonlocal is_up, line
        found = tickets.get(key)
        is_open = found is not None and not found[1].ends and key not in withdrawn
        events: dict[str, Any] = {
            "admit": Admitted(key),
            "tokens": Tokens(key, 0, [1]),
            "finish": Finished(key),
            "fail": Failed(key, "OUT_OF_MEMORY", "x"),
        }
        if action == "submit" and found is None:
            tickets[key] = ticket(key, num_beams=1 + key % 2)
            busy.submit(tickets[key][0])
        elif action in events and is_up and key in line.submitted:
            busy.handle(events[action])
        elif action == "die" and is_up:
            is_up = False
            busy.disconnect()
        elif action == "connect" and not is_up:
            is_up, line = True, Line()
            busy.connect(line, searches_beside=key < 4)
        elif action == "withdraw" and found is not None and is_open:
            withdrawn.add(key)
            busy.withdraw(found[0])
        elif action == "expire" and found is not None and is_open:
            busy.expire(found[0])
        busy.check_integrity()

    for action, key in steps:
        act(action, key)
    act("die", 0)
    busy.close(WorkerDied("the end"))
    with pytest.raises(WorkerDied, match="the end"):
        busy.submit(ticket(10_000)[0])
    busy.check_integrity()
    assert busy.num_in_flight == len(busy.queue) == 0
    for key, (_, sink) in tickets.items():
        assert len(sink.ends) == (0 if key in withdrawn else 1)
