"""A task call under way: inputs go in, results come out as they are ready, each input answered exactly once.

    add ──> checked ──> pieces of the call ──(dispatcher)──> worker ──> results ──> next_result
                 └─────> one generation for each input ──(front.open)──────┘

The two kinds differ only in who answers: a task worker (``task_tickets``), or the generation path (``task_writing``). A
run has one reader; whoever leaves it (``close``) frees everything that is still under way. Event loop.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

from slipstream_server.errors import InvalidRequest, SlipstreamError
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.tasks.inputs import check_input, check_kinds
from slipstream_server.tasks.items import ItemError, TaskInput, TaskResult
from slipstream_server.tasks.specs import TaskSpec

TaskOutcome = TaskResult | SlipstreamError
"""A result (or what is wrong with the input), or why the service could not answer."""


class TaskRun(ABC):
    """The inputs of one call and their results. ``model`` and ``adapter_version`` say who answers."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        model: str,
        adapter_version: str,
        metrics: ModelMetrics,
        on_leave: Callable[[TaskRun], None],
    ) -> None:
        self.spec = spec
        self.model = model
        self.metrics = metrics
        self._observer = metrics.of_task(spec.id, is_generated=spec.runs_by == "generate")
        self.adapter_version = adapter_version
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._on_leave = on_leave
        self._num_added = 0
        self._pending: dict[int, float] = {}  # when each came, on time.monotonic's clock
        self._results: deque[tuple[int, TaskOutcome]] = deque()
        self._changed = asyncio.Event()
        self._is_closed = False

    @property
    def num_pending(self) -> int:
        """Inputs whose result has not been read."""
        return len(self._pending) + len(self._results)

    @property
    def num_added(self) -> int:
        return self._num_added

    def add(self, inputs: Sequence[TaskInput]) -> None:
        """Take inputs; they are numbered from 0 on. All of them, or none: raises InvalidField or QueueFull."""
        check_kinds(self.spec, inputs)
        numbered = list(enumerate(inputs, start=self._num_added))
        wrong = [(index, error) for index, item in numbered if (error := self._problem(item)) is not None]
        skipped = {index for index, _ in wrong}
        self._submit([pair for pair in numbered if pair[0] not in skipped])
        self._num_added += len(inputs)
        self._pending |= dict.fromkeys((index for index, _ in numbered), time.monotonic())
        for index, error in wrong:
            self._answer(index, error)

    async def wait_for_room(self, max_pending: int) -> None:
        """Return when fewer than so many results are outstanding."""
        while self.num_pending >= max_pending and not self._is_closed:
            await self._wait()

    async def next_result(self) -> tuple[int, TaskOutcome]:
        """The next result with its input's number; waits for one, inputs or not."""
        while (found := self.ready_result()) is None:
            await self._wait()
        return found

    def ready_result(self) -> tuple[int, TaskOutcome] | None:
        """The next result, where one lies ready."""
        if not self._results:
            return None
        found = self._results.popleft()
        self._wake()
        return found

    def fail(self, error: SlipstreamError) -> None:
        """End every input that has no result yet."""
        for index in sorted(self._pending):
            self._answer(index, error)

    def close(self) -> None:
        """Nobody reads any more: free whatever is under way. Any number of times."""
        if not self._is_closed:
            self._is_closed = True
            self._withdraw()
            self._pending.clear()
            self._results.clear()
            self._wake()
            self._on_leave(self)

    @abstractmethod
    def _submit(self, items: list[tuple[int, TaskInput]]) -> None:
        """Send inputs on their way: all, or none (raises)."""

    @abstractmethod
    def _withdraw(self) -> None:
        """Stop what is under way."""

    def _problem(self, item: TaskInput) -> ItemError | None:
        try:
            check_input(self.spec, item)
        except InvalidRequest as error:
            return item_error(error)
        return None

    def _answer(self, index: int, outcome: TaskOutcome) -> None:
        arrival_s = self._pending.pop(index, None)
        if arrival_s is not None:
            reason = outcome.reason if isinstance(outcome, SlipstreamError | ItemError) else ""
            self._observer.answered(time.monotonic() - arrival_s, reason)
            self._results.append((index, outcome))
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self) -> None:
        await self._changed.wait()


def item_error(error: SlipstreamError) -> ItemError:
    """An error as the result of one input."""
    field = error.violations[0].field if error.violations else ""
    return ItemError(error.reason, error.message, field)
