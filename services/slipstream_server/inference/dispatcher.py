"""Who is where: requests in the queue, requests in the worker, and what happens to each when the worker dies.

    queue ──(credit)──> in flight ──> terminal event
      ^                    │
      └──(worker died, no token yet, first time)

A request is in at most one of the two; it leaves by exactly one call of ``finished``, ``fail`` or ``withdraw``. About
``max_rows`` rows are in flight, so that the worker never lacks work and the order of the rest stays the queue's to
decide. Requests that have seen a worker die are dispatched one at a time, each when the one before has its first token:
a poisoned request takes nobody without a token along when it kills the next worker. Beam searches give none before
their end: they count as begun with their first column.

Synchronous code on the event loop. Knows nothing of text, processes or restarts.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from slipstream_server.errors import DeadlineExceeded, SlipstreamError, WorkerDied
from slipstream_server.inference.adapter_metrics import AdaptersInUse, adapter_id
from slipstream_server.inference.admission import AdmissionLimits, AdmissionQueue
from slipstream_server.inference.calls import Priority
from slipstream_server.inference.generation import (
    Admitted,
    Cancel,
    Command,
    EndSequence,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    Submit,
    SubmitTask,
    TaskResults,
    Tokens,
)
from slipstream_server.inference.worker_errors import error_of
from slipstream_server.logs import unforeseen
from slipstream_server.tasks.items import TaskRequest

MAX_DEATHS = 2
# One search runs and the next one lies ready; the order of the rest stays the queue's to decide.
_MOST_BESIDE = 2

RequestEvent = Admitted | PromptLogprobs | Tokens | TaskResults | Finished | Failed
_OF_REQUESTS = (Admitted, PromptLogprobs, Tokens, TaskResults, Finished, Failed)


class Sink(Protocol):
    """Where the events of one request go. After ``finished`` or ``fail`` nothing more comes."""

    def admitted(self, event: Admitted) -> None: ...
    def finished(self) -> None: ...
    def fail(self, error: SlipstreamError) -> None: ...


class RequestSink(Sink, Protocol):
    """The sink of a generation."""

    def tokens(self, event: Tokens) -> bool:
        """True where a stop string ended the sequence, so that the worker is to end it too."""

    def prompt_logprobs(self, event: PromptLogprobs) -> None: ...


class TaskSink(Sink, Protocol):
    """The sink of a task. A request that starts over gives results a second time."""

    def results(self, event: TaskResults) -> None: ...


@dataclass(slots=True, eq=False, kw_only=True)
class Errand(ABC):
    """A request of any kind on its way.

    ``num_deaths`` counts workers that died with it, ``has_joined`` says that it is in a batch, ``is_bound`` that it
    cannot start over with another one: tokens have gone out, or a search has begun, which gives them only at its end.
    """

    arrival_s: float = field(default_factory=time.monotonic)
    num_deaths: int = 0
    has_joined: bool = False
    is_bound: bool = False

    @property
    @abstractmethod
    def asked(self) -> GenerationRequest | TaskRequest:
        """What the worker is asked to do."""

    @property
    @abstractmethod
    def told(self) -> Sink:
        """Who is told what comes of it."""

    @property
    @abstractmethod
    def num_prompt_tokens(self) -> int:
        """What it adds to the queue's tokens."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """What it adds to the worker's rows."""

    @property
    def is_search(self) -> bool:
        """Whether it is a beam search."""
        return False

    @abstractmethod
    def command(self) -> Command:
        """What sends it to the worker."""

    @property
    def id(self) -> int:
        return self.asked.id

    @property
    def priority(self) -> Priority:
        return Priority(self.asked.priority)

    @property
    def deadline_s(self) -> float:
        deadline_s = self.asked.deadline_monotonic_s
        return math.inf if deadline_s is None else deadline_s


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket(Errand):
    """A generation on its way."""

    request: GenerationRequest
    sink: RequestSink

    @property
    def asked(self) -> GenerationRequest:
        return self.request

    @property
    def told(self) -> RequestSink:
        return self.sink

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_rows(self) -> int:
        return max(self.request.num_return_sequences, self.request.beams.num_beams)

    @property
    def is_search(self) -> bool:
        return self.request.beams.num_beams > 1

    def command(self) -> Command:
        return Submit(self.request)


@dataclass(slots=True, eq=False, kw_only=True)
class TaskTicket(Errand):
    """Inputs of a task on their way. ``num_tokens`` is estimated: only the worker tokenizes them."""

    request: TaskRequest
    sink: TaskSink
    num_tokens: int = 0

    @property
    def asked(self) -> TaskRequest:
        return self.request

    @property
    def told(self) -> TaskSink:
        return self.sink

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens

    @property
    def num_rows(self) -> int:
        return len(self.request.inputs)

    def command(self) -> Command:
        return SubmitTask(self.request)


class Dispatcher:
    """The requests of one model."""

    def __init__(self, *, limits: AdmissionLimits, max_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = AdmissionQueue[Errand](limits, clock)
        self._max_rows = max_rows
        self._clock = clock
        self._in_flight: dict[int, Errand] = {}
        self._num_rows = 0
        self._num_beside = 0
        self._searches_beside = False
        self._suspect: Errand | None = None
        self._send: Callable[[Command], None] | None = None
        self._closed: SlipstreamError | None = None
        self._idle = asyncio.Event()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    # The metrics ask for these on another thread: the books are copied before they are read.

    @property
    def num_running(self) -> int:
        """Requests in a batch."""
        return sum(ticket.has_joined for ticket in list(self._in_flight.values()))

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, here or in the worker."""
        return len(self.queue) + sum(not ticket.has_joined for ticket in list(self._in_flight.values()))

    def adapters_in_use(self) -> AdaptersInUse:
        """The adapters that requests in a batch, and requests in the queue, are for."""
        sent = list(self._in_flight.values())
        waiting = [*(ticket for ticket in sent if not ticket.has_joined), *self.queue]
        return AdaptersInUse(
            running=_adapters_of(ticket for ticket in sent if ticket.has_joined), waiting=_adapters_of(waiting)
        )

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued, in flight, or on its way into the queue."""
        return not self._in_flight and not len(self.queue) and not self.queue.num_reserved

    async def idle(self) -> None:
        """Returns when no request is queued or in flight."""
        while self._in_flight or len(self.queue):
            self._idle.clear()
            await self._idle.wait()

    def submit(self, ticket: Errand) -> None:
        """Take a request; raises QueueFull, or what ``close`` was told."""
        if self._closed is not None:
            raise self._closed.with_traceback(None)
        self.queue.put(ticket)
        self._pump()

    def withdraw(self, ticket: Errand) -> None:
        """The request is not wanted any more; its sink hears nothing."""
        if not self.queue.remove(ticket) and self._leave(ticket) and self._send is not None:
            self._send(Cancel(ticket.id))
        self._pump()

    def expire(self, ticket: Errand) -> None:
        """The request's deadline has passed."""
        self.withdraw(ticket)
        ticket.told.fail(_too_late())

    def connect(self, send: Callable[[Command], None], *, searches_beside: bool = False) -> None:
        """A worker is ready; ``send`` never blocks. ``searches_beside``: it runs beam searches beside its batch, where
        they take none of its rows.
        """
        self._searches_beside = searches_beside
        self._send = send
        self._pump()

    def disconnect(self) -> None:
        """The worker is gone: what had begun fails, the rest is queued again, first in its old order."""
        self._send = None
        victims = list(self._in_flight.values())
        for ticket in reversed(victims):
            self._leave(ticket)
            ticket.num_deaths += 1
            ticket.has_joined = False
            if ticket.is_bound:
                ticket.told.fail(WorkerDied("the model's worker died in the middle of the answer", retry_after_s=1.0))
            elif ticket.num_deaths >= MAX_DEATHS:
                ticket.told.fail(WorkerDied(f"{ticket.num_deaths} workers died while they held this request"))
            else:
                self.queue.put_back(ticket)
        self._note_idle()

    def refuse_hopeless(self, ready_at_s: float, error: SlipstreamError) -> None:
        """End what waits for a worker and would be too late by ``ready_at_s``: its caller may still go elsewhere."""
        for ticket in list(self.queue):
            if ticket.deadline_s <= ready_at_s:
                self.queue.remove(ticket)
                ticket.told.fail(error)
        self._note_idle()

    def fail_all(self, error: SlipstreamError) -> None:
        """End every request there is."""
        self._send = None
        for ticket in [*self._in_flight.values(), *self.queue]:
            self.queue.remove(ticket)
            self._leave(ticket)
            ticket.told.fail(error)
        self._note_idle()

    def close(self, error: SlipstreamError) -> None:
        """End every request there is, and refuse those that come: no worker will answer them."""
        self._closed = error
        self.fail_all(error)

    def handle(self, event: Event) -> None:
        """Pass one event of the worker on; events of requests that have left are ignored."""
        if not isinstance(event, _OF_REQUESTS):
            return
        ticket = self._in_flight.get(event.id)
        if ticket is None:
            return
        try:
            self._pass_on(ticket, event)
        except Exception as error:
            self.withdraw(ticket)
            ticket.told.fail(unforeseen(error, "passing a worker's event on"))

    def _pass_on(self, ticket: Errand, event: RequestEvent) -> None:
        match event:
            case Admitted():
                ticket.has_joined = True
                if ticket.is_search:
                    self._bind(ticket)
                ticket.told.admitted(event)
            case Finished():
                self._leave(ticket)
                ticket.told.finished()
            case Failed():
                self._leave(ticket)
                ticket.told.fail(error_of(event.reason, event.message, event.field, event.metadata))
            case TaskResults():
                if isinstance(ticket, TaskTicket):
                    ticket.has_joined = True
                    ticket.sink.results(event)
            case PromptLogprobs() | Tokens():
                if isinstance(ticket, Ticket):
                    self._pass_on_tokens(ticket, event)
        self._pump()

    def _pass_on_tokens(self, ticket: Ticket, event: PromptLogprobs | Tokens) -> None:
        if isinstance(event, PromptLogprobs):
            ticket.sink.prompt_logprobs(event)
            return
        ticket.has_joined = True
        self._bind(ticket)
        if ticket.sink.tokens(event) and self._send is not None:
            self._send(EndSequence(event.id, event.index))

    def _pump(self) -> None:
        while self._send is not None and self._suspect is None and (ticket := self._next()) is not None:
            if self._in_flight and self._num_rows + self._rows_of(ticket) > self._max_rows:
                break
            if ticket.deadline_s <= self._clock():  # its timer is about to fire
                self.queue.remove(ticket)
                ticket.told.fail(_too_late())
                continue
            self.queue.take(ticket)
            self._in_flight[ticket.id] = ticket
            self._num_rows += self._rows_of(ticket)
            self._num_beside += self._is_beside(ticket)
            if ticket.num_deaths:
                self._suspect = ticket
            self._send(ticket.command())
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._in_flight and not len(self.queue):
            self._idle.set()

    def _leave(self, ticket: Errand) -> bool:
        self._clear(ticket)
        if self._in_flight.pop(ticket.id, None) is None:
            return False
        self._num_rows -= self._rows_of(ticket)
        self._num_beside -= self._is_beside(ticket)
        return True

    def _next(self) -> Errand | None:
        return self.queue.peek(searches=self._num_beside < _MOST_BESIDE)

    def _is_beside(self, ticket: Errand) -> bool:
        return self._searches_beside and ticket.is_search

    def _rows_of(self, ticket: Errand) -> int:
        return 0 if self._is_beside(ticket) else ticket.num_rows

    def _bind(self, ticket: Errand) -> None:
        """Whatever becomes of its worker, nobody waits for this one any more."""
        ticket.is_bound = True
        self._clear(ticket)

    def _clear(self, ticket: Errand) -> None:
        if self._suspect is ticket:
            self._suspect = None

    def check_integrity(self) -> None:
        """For tests and idle moments: the books agree."""
        assert self._num_rows == sum(map(self._rows_of, self._in_flight.values()))
        assert self._num_beside == sum(map(self._is_beside, self._in_flight.values())) <= _MOST_BESIDE
        assert self.queue.num_prompt_tokens == sum(ticket.num_prompt_tokens for ticket in self.queue)
        assert not {ticket.id for ticket in self.queue} & self._in_flight.keys()
        assert self._suspect is None or self._suspect.id in self._in_flight


def _adapters_of(tickets: Iterable[Errand]) -> frozenset[str]:
    pins = (ticket.request.adapter for ticket in tickets if isinstance(ticket, Ticket))
    return frozenset(adapter_id(pin.version) for pin in pins if pin is not None)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the answer was complete")
