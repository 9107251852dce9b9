"""The inference front: models by name, requests in, streams out. What ``rpc/`` talks to.

    open(call) -> resolve model -> tokenize -> resolve fields -> dispatcher -> worker -> GenerationStream

Lives on one event loop, between ``start`` and ``close``. Every long task is held by one TaskGroup; the first that dies
unforeseen stops the front, and ``wait_stopped`` raises its error, so that the service ends loudly instead of limping.
Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry

from slipstream_server.errors import DeadlineExceeded, Unavailable, UnsupportedField
from slipstream_server.inference.calls import ChatPrompt, GenerateCall, Prompt, StartedEvent
from slipstream_server.inference.front_models import FrontConfig as FrontConfig
from slipstream_server.inference.front_models import FrontModels
from slipstream_server.inference.generation import AdapterPin, GenerationRequest
from slipstream_server.inference.metrics import InferenceMetrics, Operation
from slipstream_server.inference.prompts import EncodedPrompt
from slipstream_server.inference.resolve import check_call, resolve
from slipstream_server.inference.served_model import ModelPlan as ModelPlan
from slipstream_server.inference.served_model import ServedModel
from slipstream_server.inference.streams import GenerationStream
from slipstream_server.inference.task_calls import TaskCall, check_model, check_task
from slipstream_server.inference.task_runs import TaskRun
from slipstream_server.inference.task_tickets import WorkerRun
from slipstream_server.inference.task_writing import WriterRun
from slipstream_server.models.tokenizer import TokenSpan
from slipstream_server.tasks.generation_prompts import check_languages, shape_of
from slipstream_server.tasks.generation_settings import settings_of
from slipstream_server.tasks.parameters import check_parameters
from slipstream_server.tasks.registry import NamedTask

AdapterResolver = Callable[[str, str], Awaitable[AdapterPin | None]]
"""Model and adapter as a request names it (empty: the model's default) to an immutable version; None is the base."""


class InferenceFront(FrontModels):
    """All models of one inference service, and the requests to them."""

    def __init__(
        self,
        config: FrontConfig,
        *,
        registry: CollectorRegistry | None = None,
        resolve_adapter: AdapterResolver | None = None,
    ) -> None:
        super().__init__(config, InferenceMetrics(registry or CollectorRegistry()))
        self._resolve_adapter = resolve_adapter
        self._streams: dict[GenerationStream, asyncio.TimerHandle | None] = {}
        self._task_runs: set[TaskRun] = set()
        self._request_ids = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        self._main: asyncio.Task[None] | None = None

    def use_adapters(self, resolve_adapter: AdapterResolver) -> None:
        """Resolve adapters by ``resolve_adapter`` from now on; for resolvers that look at the front's own models."""
        self._resolve_adapter = resolve_adapter

    # Life.

    async def start(self) -> None:
        """Begin; models can be added from here on."""
        running = asyncio.Event()
        self._main = asyncio.create_task(self._run(running), name="inference-front")
        await running.wait()

    async def wait_stopped(self) -> None:
        """Returns after ``close``; raises when a task of the front has died."""
        assert self._main is not None
        await asyncio.shield(self._main)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, let those under way finish within ``grace_s``, end the rest with Unavailable."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        for model in self._models.values():
            model.dispatcher.close(
                Unavailable("the service is going down", retry_after_s=self._config.drain_retry_after_s)
            )

    async def close(self) -> None:
        """End every stream and every worker. Idempotent."""
        self._is_draining = True
        self._stop.set()
        stopped = Unavailable("the service has stopped", retry_after_s=self._config.drain_retry_after_s)
        for stream in list(self._streams):
            stream.fail(stopped)
        for run in list(self._task_runs):
            run.fail(stopped)
        if self._main is not None:
            await asyncio.gather(self._main, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, running: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                sweeper = tasks.create_task(self._cut_off_slow_readers(), name="slow-readers")
                running.set()
                await self._stop.wait()
                sweeper.cancel()
                for model in self._models.values():
                    if model.task is not None:
                        model.task.cancel()
        finally:
            self._is_draining = True
            self._stop.set()
            self.notify()
            for stream in list(self._streams):
                stream.fail(Unavailable("the service has stopped"))

    # Requests.

    def is_idle(self, name: str) -> bool:
        """Whether a served model has no request, begun or waiting, and none on its way into the queue."""
        in_use = {*(stream.model for stream in self._streams), *(run.model for run in self._task_runs)}
        return self._models[name].dispatcher.is_idle and name not in in_use

    async def open(self, call: GenerateCall) -> GenerationStream:
        """Validate, tokenize and queue a request. The stream must be read to its end or closed.

        Raises InvalidField, UnsupportedField, PromptTooLong, WrongState, ModelNotFound, ModelNotReady, QueueFull,
        Draining or DeadlineExceeded; with an adapter, also what its resolver does.
        """
        model = self._ready(call.model)
        model.check_generates()
        check_call(call, model.limits)
        arrival_s = time.monotonic()
        prompt, adapter = await self._prepared(call, model)
        request = resolve(
            call,
            model.plan.facts,
            model.limits,
            request_id=next(self._request_ids),
            prompt_token_ids=prompt.token_ids,
            adapter=adapter,
            arrival_monotonic_s=arrival_s,
        )
        self._ready(model.plan.name)  # it may have died, or we begun to drain, meanwhile
        _check_deadline(call)
        stream = self._stream(call, request, prompt.text, model, arrival_s)
        model.dispatcher.submit(stream.ticket)
        self._hold(stream, model)
        return stream

    async def _prepared(self, call: GenerateCall, model: ServedModel) -> tuple[EncodedPrompt, AdapterPin | None]:
        """The prompt's tokens and the adapter's version, with a place in the queue kept meanwhile."""
        model.dispatcher.queue.reserve()
        try:
            prompt = await model.text.encode(
                call.prompt,
                vocab_size=model.limits.vocab_size,
                context_tokens=model.limits.context_tokens,
                with_text=call.response.echo,
            )
            return prompt, await self._adapter(model.plan.name, call.adapter)
        finally:
            model.dispatcher.queue.release()

    def _stream(
        self, call: GenerateCall, request: GenerationRequest, echo_text: str, model: ServedModel, arrival_s: float
    ) -> GenerationStream:
        version = request.adapter.version if request.adapter else ""
        operation: Operation = "chat" if isinstance(call.prompt, ChatPrompt) else "text_completion"
        stream = GenerationStream(
            request,
            started=StartedEvent(model=model.plan.name, adapter_version=version),
            response=call.response,
            stop=call.stopping.stop,
            echo_text=echo_text,
            detokenizers=model.text.detokenizers,
            observer=model.metrics.of_request(version, operation=operation, arrival_s=arrival_s),
            on_leave=self._left,
        )
        stream.ticket.arrival_s = arrival_s
        return stream

    async def open_task(self, call: TaskCall) -> TaskRun:
        """Begin a task: the run takes inputs and gives results. It must be closed.

        Raises InvalidField, UnknownParameter, UnsupportedField, WrongState, MissingDependency, ModelNotFound,
        ModelNotReady, Draining or DeadlineExceeded; with an adapter, also what its resolver does.
        """
        task = check_task(call)
        parameters = check_parameters(task.spec, call.parameters)
        model = self._ready(call.model or self.task_model(task.spec))
        check_model(task.spec, model.plan.name, model.plan.facts, model.plan.worker.load)
        _check_deadline(call)
        if task.spec.runs_by == "generate":
            run = await self._writer_run(task, call, parameters, model)
        else:
            run = self._worker_run(task, call, parameters, model)
        self._task_runs.add(run)
        self._idle.clear()
        return run

    def _worker_run(
        self, task: NamedTask, call: TaskCall, parameters: Mapping[str, Any], model: ServedModel
    ) -> TaskRun:
        return WorkerRun(
            task.spec,
            model=model.plan.name,
            parameters=parameters,
            dispatcher=model.dispatcher,
            request_ids=self._request_ids,
            deadline_monotonic_s=call.deadline_monotonic_s,
            metrics=model.metrics,
            on_leave=self._run_left,
        )

    async def _writer_run(
        self, task: NamedTask, call: TaskCall, parameters: Mapping[str, Any], model: ServedModel
    ) -> TaskRun:
        shape = shape_of(task, parameters, model.writing)
        text, context_tokens = model.text, model.limits.context_tokens
        check_languages(shape, text.tokenizer)
        adapter = await self._adapter(model.plan.name, call.adapter)
        return WriterRun(
            task.spec,
            model=model.plan.name,
            adapter=adapter.version if adapter else call.adapter,  # an alias that moves meanwhile changes nothing
            adapter_version=adapter.version if adapter else "",
            parameters=parameters,
            shape=shape,
            settings=settings_of(task, parameters, shape.own, model.writing),
            context_tokens=context_tokens,
            write_prompt=lambda given, how: text.write(given, how, context_tokens),
            open_generation=self.open,
            deadline_monotonic_s=call.deadline_monotonic_s,
            metrics=model.metrics,
            on_leave=self._run_left,
        )

    async def tokenize(self, model: str, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens of ``text`` and the characters they cover."""
        return await self._find(model).text.spans(text, add_special_tokens=add_special_tokens)

    async def detokenize(self, model: str, token_ids: tuple[int, ...], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``."""
        found = self._find(model)
        vocab_size = found.limits.vocab_size
        return await found.text.decode(token_ids, vocab_size=vocab_size, skip_special_tokens=skip_special_tokens)

    async def count_tokens(self, model: str, prompt: Prompt) -> int:
        """How many tokens ``open`` would make of a prompt, be it longer than the context."""
        found = self._find(model)
        encoded = await found.text.encode(prompt, vocab_size=found.limits.vocab_size, context_tokens=None)
        return len(encoded.token_ids)

    @property
    def num_streams(self) -> int:
        """Requests whose end has not been read yet."""
        return len(self._streams)

    async def _adapter(self, model: str, adapter: str) -> AdapterPin | None:
        if self._resolve_adapter is not None:
            return await self._resolve_adapter(model, adapter)
        if adapter:
            raise UnsupportedField.of("adapter", "this service has no adapter registry")
        return None

    def _hold(self, stream: GenerationStream, model: ServedModel) -> None:
        deadline_s = stream.ticket.request.deadline_monotonic_s
        loop = asyncio.get_running_loop()
        timer = None
        if deadline_s is not None:  # the loop's clock is CLOCK_MONOTONIC too
            timer = loop.call_at(deadline_s, model.dispatcher.expire, stream.ticket)
        self._streams[stream] = timer
        self._idle.clear()

    def _left(self, stream: GenerationStream) -> None:
        timer = self._streams.pop(stream, None)
        if timer is not None:
            timer.cancel()
        model = self._models.get(stream.model)
        if model is not None:
            model.dispatcher.withdraw(stream.ticket)
        self._note_idle()

    def _run_left(self, run: TaskRun) -> None:
        self._task_runs.discard(run)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams and not self._task_runs:
            self._idle.set()

    async def _cut_off_slow_readers(self) -> None:
        while True:
            await asyncio.sleep(min(self._config.write_timeout_s / 4, 1.0))
            for stream in list(self._streams):
                if stream.unread_s() > self._config.write_timeout_s:
                    stream.cut_off()


def _check_deadline(call: GenerateCall | TaskCall) -> None:
    if call.deadline_monotonic_s is not None and call.deadline_monotonic_s <= time.monotonic():
        raise DeadlineExceeded("the deadline passed before the request was queued")
