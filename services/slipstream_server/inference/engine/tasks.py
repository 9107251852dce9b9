"""The task engine: inputs of many requests are prepared on side threads, cut into pieces, batched across requests by
size, run on the engine's thread and finished on the side threads again.

    submit -> prepare (side) -> queue of pieces -> run (engine) -> finish (side) -> TaskResults ... Finished

An input that fails does so alone: what raises in a batch is narrowed down by running its halves, down to the one piece
at fault, whose input gets an ItemError. Only a deadline or a task that this worker does not do ends a whole request.
Every request that is not cancelled ends in exactly one terminal event.

Synchronous but for the side threads, which see only what they are handed: all state belongs to the thread that calls
the methods. ``run`` may use threads of its own, and is done with them when it returns. It knows nothing of sockets.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream_server.errors import DeadlineExceeded, OutOfMemory, SlipstreamError, UnsupportedField
from slipstream_server.inference.engine.faults import is_fatal, is_out_of_memory
from slipstream_server.inference.engine.outbox import Gauges, Outbox
from slipstream_server.inference.engine.side_threads import SideThreads
from slipstream_server.inference.generation import Admitted, Event, Finished, TaskResults
from slipstream_server.logs import log_failure, unforeseen
from slipstream_server.tasks.batching import Company, PieceQueue, TaskLimits, Work
from slipstream_server.tasks.items import ItemError, TaskRequest, TaskResult
from slipstream_server.tasks.runner import Piece, Runner

logger = logging.getLogger(__name__)

_HANDFUL = 16
_NUM_SIDE_THREADS = 2


@dataclass(slots=True, eq=False)
class _Input:
    """An input whose pieces are at work: the results of those that have run, and how many are missing."""

    raw: list[Any]
    num_missing: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Live:
    """A request until its terminal event. ``is_over`` is read by the side threads."""

    request: TaskRequest
    runner: Runner
    num_unanswered: int
    is_admitted: bool = False
    is_over: bool = False
    inputs: dict[int, _Input] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The pieces of a handful of inputs, by index, or why there are none."""

    live: _Live
    pieces: list[tuple[int, Sequence[Piece] | ItemError]]
    next_index: int


@dataclass(frozen=True, slots=True)
class _Answered:
    """Results of some inputs, by index."""

    live: _Live
    results: list[tuple[int, TaskResult]]
    num_tokens: int


class TaskEngine:
    """Serves the tasks of ``runners``, by task id.

    ``run`` runs a batch, as ``Runner.run`` does. ``wake`` is called from other threads when ``step`` has something to
    do. ``counting_tasks`` are those whose pieces are measured in tokens, which TaskResults reports.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        limits: TaskLimits,
        *,
        run: Callable[[Runner, Sequence[Piece]], Sequence[Any]],
        wake: Callable[[], None] = lambda: None,
        counting_tasks: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runners = dict(runners)
        self._counting_tasks = counting_tasks
        self._run_batch = run
        self._clock = clock
        self._queue = PieceQueue(limits)
        self._company = Company()
        self._side: SideThreads[_Prepared | _Answered] = SideThreads(_NUM_SIDE_THREADS, wake)
        self._live: dict[int, _Live] = {}
        self._parts: deque[list[Work]] = deque()
        self._num_preparing = 0
        self._outbox = Outbox(clock)

    def submit(self, request: TaskRequest) -> None:
        """Take a request; one whose task this worker does not do fails here."""
        runner = self._runners.get(request.task)
        if request.id in self._live:
            logger.error("request id %d is in use already; the second one is ignored", request.id)
        elif runner is None:
            known = ", ".join(sorted(self._runners))
            problem = UnsupportedField.of("task", f"{request.task[:100]!r} is none of this model's tasks ({known})")
            self._outbox.fail(request.id, problem)
        else:
            live = self._live[request.id] = _Live(request, runner, len(request.inputs))
            self._company.note(len(self._live), self._clock())
            self._prepare(live, 0)
            self._finish_if_over(live)

    def cancel(self, request_id: int) -> None:
        """Forget a request; its pieces are in no later batch. No event follows; unknown ids are ignored."""
        if (live := self._live.pop(request_id, None)) is not None:
            live.is_over = True
            self._queue.remove(request_id)

    def end_sequence(self, request_id: int, index: int) -> None:
        """Tasks have no sequences: ignored."""

    def step(self) -> list[Event]:
        """Take in what the side threads have done, run one batch, emit."""
        for outcome in self._side.take():
            if isinstance(outcome, _Prepared):
                self._take_prepared(outcome)
            else:
                self._take_answered(outcome)
        self._drop_expired()
        if batch := self._next_batch():
            self._run(batch)
        num_running = sum(live.is_admitted for live in self._live.values())
        self._outbox.report(Gauges(num_running=num_running, num_waiting=len(self._live) - num_running))
        return self._outbox.take()

    def wait_s(self) -> float | None:
        """0 while there is something to do, else the time until a batch or a deadline is due; the side threads wake
        whoever waits.
        """
        if self._parts or self._side.has_outcomes or self._outbox.has_events:
            return 0.0
        now = self._clock()
        dues = [live.request.deadline_monotonic_s for live in self._live.values()]
        dues.append(self._queue.due_s(now, more_coming=self._more_coming()))
        due = min((due for due in dues if due is not None), default=None)
        return None if due is None else max(0.0, due - now)

    def close(self) -> None:
        """Begin nothing more on the side threads."""
        self._side.close()

    def check_integrity(self) -> None:
        """Assert that every live request is still to be answered, and that every queue knows only live ones."""
        self._queue.check_integrity()
        for request_id, live in self._live.items():
            assert request_id == live.request.id
            assert not live.is_over
            assert live.num_unanswered > 0
            assert all(0 < entry.num_missing <= len(entry.raw) for entry in live.inputs.values())

    def _prepare(self, live: _Live, first: int) -> None:
        """Have the next handful of inputs prepared."""
        if first < len(live.request.inputs):
            self._num_preparing += 1
            self._side.do(lambda: _prepare_handful(live, first))

    def _take_prepared(self, prepared: _Prepared) -> None:
        self._num_preparing -= 1
        live = prepared.live
        if live.is_over:
            return
        self._prepare(live, prepared.next_index)
        unfit: list[tuple[int, TaskResult]] = []
        empty: list[tuple[int, list[Any]]] = []
        for index, pieces in prepared.pieces:
            if isinstance(pieces, ItemError):
                unfit.append((index, pieces))
            elif not pieces:
                empty.append((index, []))
            else:
                self._enqueue(live, index, pieces)
        if unfit:
            self._answer(live, unfit, 0)
        if empty:
            self._side.do(lambda: _finish(live, empty, 0))

    def _enqueue(self, live: _Live, index: int, pieces: Sequence[Piece]) -> None:
        request = live.request
        counts = request.task in self._counting_tasks
        num_tokens = sum(piece.size for piece in pieces) if counts else 0
        live.inputs[index] = _Input([None] * len(pieces), len(pieces), num_tokens)
        work = (Work(request.id, index, n, piece, (request.task, piece.group)) for n, piece in enumerate(pieces))
        self._queue.add(work, request.priority, self._clock(), call=request.call)

    def _take_answered(self, answered: _Answered) -> None:
        if not answered.live.is_over:
            self._answer(answered.live, answered.results, answered.num_tokens)

    def _next_batch(self) -> list[Work]:
        """A part of a batch that failed, else a new one; without what nobody wants any more."""
        while self._parts:
            if part := [work for work in self._parts.popleft() if self._is_wanted(work)]:
                return part
        self._company.note(len(self._live), self._clock())
        return self._queue.collect(self._clock(), more_coming=self._more_coming())

    def _more_coming(self) -> bool:
        return self._num_preparing > 0 or self._company.is_missing(len(self._live))

    def _is_wanted(self, work: Work) -> bool:
        live = self._live.get(work.request_id)
        return live is not None and work.input_index in live.inputs

    def _run(self, batch: list[Work]) -> None:
        """One forward pass; where it fails, its halves are next, or the one piece's input has failed."""
        for request_id in {work.request_id for work in batch}:
            self._admit(self._live[request_id])
        runner = self._live[batch[0].request_id].runner
        self._outbox.totals.steps += 1
        self._outbox.totals.rows += len(batch)
        try:
            results = self._run_batch(runner, [work.piece for work in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results of {len(batch)} pieces")
        except Exception as error:
            self._narrow_down(batch, error)
        else:
            self._keep(batch, results)

    def _keep(self, batch: Sequence[Work], results: Sequence[Any]) -> None:
        """Store the pieces' results; inputs that are complete now are finished, those of one request together."""
        complete: dict[int, list[int]] = {}
        for work, result in zip(batch, results, strict=True):
            entry = self._live[work.request_id].inputs[work.input_index]
            entry.raw[work.piece_index] = result
            entry.num_missing -= 1
            if not entry.num_missing:
                complete.setdefault(work.request_id, []).append(work.input_index)
        for request_id, indices in complete.items():
            self._finish_inputs(self._live[request_id], indices)

    def _finish_inputs(self, live: _Live, indices: Sequence[int]) -> None:
        entries = [(index, live.inputs.pop(index)) for index in indices]
        raw = [(index, entry.raw) for index, entry in entries]
        num_tokens = sum(entry.num_tokens for _, entry in entries)
        self._outbox.totals.prompt_tokens += num_tokens
        self._side.do(lambda: _finish(live, raw, num_tokens))

    def _narrow_down(self, batch: list[Work], error: Exception) -> None:
        if is_fatal(error):
            raise error
        if len(batch) > 1:
            if not is_out_of_memory(error):
                log_failure(error, f"running a batch of {len(batch)} pieces; each half is tried alone")
            middle = len(batch) // 2
            self._parts.extendleft([batch[middle:], batch[:middle]])
            return
        work = batch[0]
        live = self._live[work.request_id]
        del live.inputs[work.input_index]
        self._queue.remove(work.request_id, work.input_index)
        self._answer(live, [(work.input_index, _item_error(error, "running one piece"))], 0)

    def _admit(self, live: _Live) -> None:
        if not live.is_admitted:
            live.is_admitted = True
            self._outbox.put(Admitted(live.request.id))

    def _answer(self, live: _Live, results: Sequence[tuple[int, TaskResult]], num_tokens: int) -> None:
        self._admit(live)
        indices = [index for index, _ in results]
        self._outbox.put(TaskResults(live.request.id, indices, [result for _, result in results], num_tokens))
        live.num_unanswered -= len(results)
        self._finish_if_over(live)

    def _finish_if_over(self, live: _Live) -> None:
        if not live.num_unanswered:
            live.is_over = True
            del self._live[live.request.id]
            self._outbox.put(Finished(live.request.id))

    def _drop_expired(self) -> None:
        now = self._clock()
        for request_id, live in list(self._live.items()):
            deadline = live.request.deadline_monotonic_s
            if deadline is not None and now >= deadline:
                self.cancel(request_id)
                self._outbox.fail(request_id, DeadlineExceeded("the deadline passed before every input was answered"))


def _prepare_handful(live: _Live, first: int) -> _Prepared:
    """Prepare some inputs from ``first`` on. Side thread."""
    request = live.request
    after = min(first + _HANDFUL, len(request.inputs))
    prepared: list[tuple[int, Sequence[Piece] | ItemError]] = []
    for index in range(first, after):
        if live.is_over:
            break
        try:
            prepared.append((index, live.runner.prepare(request.inputs[index], request.parameters)))
        # A panic of the tokenizers library is no Exception.
        except BaseException as error:
            prepared.append((index, _item_error(error, f"preparing an input of {request.task}")))
    return _Prepared(live, prepared, after)


def _finish(live: _Live, raw: Sequence[tuple[int, Sequence[Any]]], num_tokens: int) -> _Answered:
    """Turn the pieces' results into the inputs' results. Side thread."""
    request = live.request
    results: list[tuple[int, TaskResult]] = []
    for index, parts in raw:
        if live.is_over:
            break
        try:
            results.append((index, live.runner.finish(request.inputs[index], request.parameters, parts)))
        except BaseException as error:
            results.append((index, _item_error(error, f"finishing a result of {request.task}")))
    return _Answered(live, results, num_tokens)


def _item_error(error: BaseException, doing: str) -> ItemError:
    """The error as the client may see it; what it does not name goes to the log."""
    if not isinstance(error, SlipstreamError):
        if is_out_of_memory(error):
            error = OutOfMemory("the device has not enough memory for this input")
        else:
            error = unforeseen(error, doing)
    field_name = error.violations[0].field if error.violations else ""
    return ItemError(error.reason, error.message, field_name)
