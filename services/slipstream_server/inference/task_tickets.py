"""A task call that a worker answers: its inputs travel a handful at a time, each handful with a ticket of its own.

Results come back by ticket and are told to the run under the call's own numbers. Event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

from slipstream_server.errors import InternalError, SlipstreamError
from slipstream_server.inference.dispatcher import Dispatcher, TaskTicket
from slipstream_server.inference.generation import Admitted, TaskResults
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.inference.task_runs import TaskOutcome, TaskRun
from slipstream_server.tasks.inputs import size_bytes
from slipstream_server.tasks.items import TaskInput, TaskRequest
from slipstream_server.tasks.specs import TaskSpec

INPUTS_PER_TICKET = 32
"""How many inputs of one call travel together: what one death of a worker, or one turn in the queue, is about."""
_BYTES_PER_TOKEN = 4


class WorkerRun(TaskRun):
    """A run whose inputs a task worker answers."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        model: str,
        parameters: Mapping[str, Any],
        dispatcher: Dispatcher,
        request_ids: itertools.count[int],
        deadline_monotonic_s: float | None,
        metrics: ModelMetrics,
        on_leave: Callable[[TaskRun], None],
    ) -> None:
        super().__init__(spec, model=model, adapter_version="", metrics=metrics, on_leave=on_leave)
        self._parameters = dict(parameters)
        self._dispatcher = dispatcher
        self._request_ids = request_ids
        self._call = next(request_ids)
        self._deadline_monotonic_s = deadline_monotonic_s
        self._tickets: dict[TaskTicket, asyncio.TimerHandle | None] = {}

    def _submit(self, items: list[tuple[int, TaskInput]]) -> None:
        sent: list[TaskTicket] = []
        try:
            for start in range(0, len(items), INPUTS_PER_TICKET):
                sent.append(self._ticket(items[start : start + INPUTS_PER_TICKET]))
                self._dispatcher.submit(sent[-1])
        except SlipstreamError:
            for ticket in sent:
                self._dispatcher.withdraw(ticket)
            raise
        for ticket in sent:
            self._tickets[ticket] = self._timer(ticket)

    def _ticket(self, items: list[tuple[int, TaskInput]]) -> TaskTicket:
        request = TaskRequest(
            id=next(self._request_ids),
            task=self.spec.id,
            inputs=tuple(item for _, item in items),
            call=self._call,
            parameters=self._parameters,
            deadline_monotonic_s=self._deadline_monotonic_s,
        )
        num_bytes = sum(size_bytes(item) for item in request.inputs)
        sink = _Share(self, tuple(index for index, _ in items))
        ticket = TaskTicket(request=request, sink=sink, num_tokens=num_bytes // _BYTES_PER_TOKEN)
        sink.ticket = ticket
        return ticket

    def _timer(self, ticket: TaskTicket) -> asyncio.TimerHandle | None:
        if self._deadline_monotonic_s is None:
            return None
        # The loop's clock is CLOCK_MONOTONIC too.
        return asyncio.get_running_loop().call_at(self._deadline_monotonic_s, self._dispatcher.expire, ticket)

    def _withdraw(self) -> None:
        for ticket in list(self._tickets):
            self.forget(ticket)
            self._dispatcher.withdraw(ticket)

    def forget(self, ticket: TaskTicket) -> None:
        """The ticket has come to its end."""
        if (timer := self._tickets.pop(ticket, None)) is not None:
            timer.cancel()

    def settle(self, index: int, outcome: TaskOutcome) -> None:
        """An input has its result."""
        self._answer(index, outcome)


class _Share:
    """The sink of one ticket: results by the call's numbers. Those that come again after a death are ignored."""

    def __init__(self, run: WorkerRun, indices: tuple[int, ...]) -> None:
        self._run = run
        self._indices = indices
        self._num_tokens = 0
        self.ticket: TaskTicket | None = None

    def admitted(self, event: Admitted) -> None:
        """Joining a batch is nothing the caller is told. What a worker that died has counted is forgotten."""
        self._num_tokens = 0
        if self.ticket is not None:
            self._run.metrics.task_joined(time.monotonic() - self.ticket.arrival_s)

    def results(self, event: TaskResults) -> None:
        self._num_tokens += event.num_tokens
        self._run.metrics.task_tokens(event.num_tokens)
        for place, result in zip(event.indices, event.results, strict=True):
            self._run.settle(self._indices[place], result)

    def finished(self) -> None:
        self._run.prompt_tokens += self._num_tokens
        self._end(InternalError("the worker finished without a result for this input"))

    def fail(self, error: SlipstreamError) -> None:
        self._end(error)

    def _end(self, error: SlipstreamError) -> None:
        for index in self._indices:
            self._run.settle(index, error)
        if self.ticket is not None:
            self._run.forget(self.ticket)
