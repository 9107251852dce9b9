"""A task call under way: inputs go in, results come out as they are ready, each input answered exactly once.

    add ──> checked ──> pieces of the call ──(dispatcher)──> worker ──> results ──> next_result
                 └─────> one generation for each input ──(front.open)──────┘

The two kinds differ only in who answers: a task worker, or the generation path. A run has one reader; whoever leaves it
(``close``) frees everything that is still under way. Event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from slipstream_server.errors import InternalError, InvalidRequest, QueueFull, SlipstreamError
from slipstream_server.inference.calls import (
    BeamChoice,
    DeltaEvent,
    FinishedEvent,
    GenerateCall,
    ResponseChoice,
    SamplingChoice,
    StoppingChoice,
    TokenPrompt,
)
from slipstream_server.inference.dispatcher import Dispatcher, TaskTicket
from slipstream_server.inference.generation import Admitted, TaskResults
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.inference.streams import GenerationStream
from slipstream_server.tasks.generation_prompts import PromptShape, WrittenPrompt, clean_up
from slipstream_server.tasks.generation_settings import GenerationSettings
from slipstream_server.tasks.inputs import check_input, check_kinds, size_bytes
from slipstream_server.tasks.items import (
    GeneratedText,
    GeneratedTextResult,
    ItemError,
    TaskInput,
    TaskRequest,
    TaskResult,
    TextInput,
)
from slipstream_server.tasks.specs import TaskSpec

logger = logging.getLogger(__name__)

INPUTS_PER_TICKET = 32
"""How many inputs of one call travel together: what one death of a worker, or one turn in the queue, is about."""
MAX_OPEN_GENERATIONS = 64
"""Inputs of one call that are queued or running on the generation path at once."""
_BYTES_PER_TOKEN = 4

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
        except QueueFull:
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


OpenGeneration = Callable[[GenerateCall], Awaitable[GenerationStream]]
WritePrompt = Callable[[str, PromptShape], Awaitable[WrittenPrompt]]


class WriterRun(TaskRun):
    """A run whose inputs the generation path answers, each as a request of its own, batched with all others."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        model: str,
        adapter: str,
        adapter_version: str,
        parameters: Mapping[str, Any],
        shape: PromptShape,
        settings: GenerationSettings,
        context_tokens: int,
        write_prompt: WritePrompt,
        open_generation: OpenGeneration,
        deadline_monotonic_s: float | None,
        metrics: ModelMetrics,
        on_leave: Callable[[TaskRun], None],
    ) -> None:
        super().__init__(spec, model=model, adapter_version=adapter_version, metrics=metrics, on_leave=on_leave)
        self._adapter = adapter
        self._parameters = parameters
        self._shape = shape
        self._settings = settings
        self._context_tokens = context_tokens
        self._write_prompt = write_prompt
        self._open = open_generation
        self._deadline_monotonic_s = deadline_monotonic_s
        self._turns = asyncio.Semaphore(MAX_OPEN_GENERATIONS)
        self._writing: set[asyncio.Task[None]] = set()

    def _submit(self, items: list[tuple[int, TaskInput]]) -> None:
        for index, item in items:
            assert isinstance(item, TextInput)
            task = asyncio.create_task(self._write(index, item.text), name=f"{self.spec.id}-{index}")
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    def _withdraw(self) -> None:
        for task in self._writing:
            task.cancel()

    async def _write(self, index: int, text: str) -> None:
        try:
            async with self._turns:
                outcome: TaskOutcome = await self._written(text)
        except SlipstreamError as error:
            outcome = error
        except Exception:
            log_id = uuid.uuid4().hex[:12]
            logger.exception("an input of %s failed in the front, log id %s", self.spec.id, log_id)
            outcome = InternalError(f"internal error {log_id}")
        self._answer(index, outcome)

    async def _written(self, text: str) -> TaskResult:
        prompt = await self._write_prompt(text, self._shape)
        parts: dict[int, list[DeltaEvent]] = {}
        async with await self._open(self._call(prompt)) as stream:
            async for event in stream:
                match event:
                    case DeltaEvent():
                        parts.setdefault(event.index, []).append(event)
                    case FinishedEvent():
                        self.prompt_tokens += event.prompt_tokens
                        self.completion_tokens += event.completion_tokens
        before = self._shape.prefix + text if self._parameters.get("return_full_text") else ""
        return GeneratedTextResult([self._text(before, parts[index]) for index in sorted(parts)])

    def _text(self, before: str, deltas: list[DeltaEvent]) -> GeneratedText:
        text = "".join(delta.text for delta in deltas)
        if self._parameters["clean_up_tokenization_spaces"]:
            text = clean_up(text)
        wants_ids = self._parameters["return_token_ids"] or self._parameters["return_tensors"]
        return GeneratedText(
            text=before + text,
            finish_reason=deltas[-1].finish_reason or "length",  # type: ignore[arg-type]  # one of the contract's
            token_ids=[token for delta in deltas for token in delta.token_ids] if wants_ids else [],
        )

    def _call(self, prompt: WrittenPrompt) -> GenerateCall:
        settings = self._settings
        return GenerateCall(
            model=self.model,
            prompt=TokenPrompt(token_ids=prompt.token_ids),
            adapter=self._adapter,
            sampling=SamplingChoice(**settings.sampling),
            stopping=StoppingChoice(
                max_new_tokens=self._max_new_tokens(len(prompt.token_ids)),
                min_new_tokens=settings.min_new_tokens,
                stop=settings.stop,
            ),
            response=ResponseChoice(num_return_sequences=settings.num_return_sequences),
            beams=BeamChoice(**settings.beams),
            deadline_monotonic_s=self._deadline_monotonic_s,
            forced_first_token_id=prompt.forced_first_token_id,
        )

    def _max_new_tokens(self, prompt_tokens: int) -> int | None:
        """What was asked for; what nobody asked for gives way to the context."""
        settings, used = self._settings, 0 if "encoder_decoder" in self.spec.families else prompt_tokens
        wanted = settings.max_new_tokens
        if settings.max_length is not None:
            wanted = settings.max_length - prompt_tokens
            if wanted < 1 and settings.has_default_length:
                return None
            if wanted < 1:
                text = f"{settings.max_length} is used up by a prompt of {prompt_tokens} tokens"
                raise InvalidRequest.of("parameters.max_length", text)
        if wanted is None or not settings.has_default_length:
            return wanted
        return max(1, min(wanted, self._context_tokens - used))
