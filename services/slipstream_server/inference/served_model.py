"""One model of the front: its tokenizer, its queue, its worker. One task of the front runs ``serve``; event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from slipstream_server.errors import SlipstreamError, WrongState
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.dispatcher import Dispatcher
from slipstream_server.inference.engines import TASKS
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.inference.prompts import PromptEncoder
from slipstream_server.inference.resolve import ResolveLimits
from slipstream_server.inference.supervisor import ModelState, ModelStatus, RestartPolicy, WorkerSupervisor, not_ready
from slipstream_server.inference.task_calls import served_tasks
from slipstream_server.inference.worker_config import WorkerConfig, worker_command
from slipstream_server.inference.worker_process import WorkerLaunch
from slipstream_server.models.facts import ModelFacts
from slipstream_server.tasks.generation_models import WritingModel

logger = logging.getLogger(__name__)

# Rows in the worker and on their way to it, as a multiple of a batch. Tasks are sorted by size before they are batched.
_ROWS_AHEAD = 2
_TASK_ROWS_AHEAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model to serve: its prepared folder (for the tokenizer), its facts, and how its worker is to run it.

    ``launch`` replaces the command that ``worker`` stands for. ``max_context_tokens`` bounds the context below the
    model's own. ``source`` and ``revision`` say where it came from; never a path.
    """

    name: str
    folder: Path
    facts: ModelFacts
    worker: WorkerConfig
    launch: WorkerLaunch | None = None
    max_context_tokens: int | None = None
    source: str = ""
    revision: str = ""


class ServedModel:
    """A model between ``add_model`` and ``remove_model``."""

    def __init__(
        self,
        plan: ModelPlan,
        *,
        admission: AdmissionLimits,
        restart: RestartPolicy,
        metrics: ModelMetrics,
        on_change: Callable[[], None],
    ) -> None:
        self.plan = plan
        self._limits = _limits(plan)
        self.metrics = metrics
        rows_ahead = _TASK_ROWS_AHEAD if self.runs_tasks else _ROWS_AHEAD
        self.dispatcher = Dispatcher(limits=admission, max_rows=rows_ahead * plan.worker.max_batch_size)
        self.supervisor = WorkerSupervisor(
            status=ModelStatus(model=plan.name),
            launch=plan.launch or WorkerLaunch(command=partial(worker_command, plan.worker)),
            dispatcher=self.dispatcher,
            policy=restart,
            metrics=metrics,
            on_change=on_change,
        )
        self.task: asyncio.Task[None] | None = None
        self.last_used_s = time.monotonic()
        self._encoder: PromptEncoder | None = None
        self._writing: WritingModel | None = None
        metrics.watch(
            running=lambda: self.dispatcher.num_running,
            waiting=lambda: self.dispatcher.num_waiting,
            adapter_slots=plan.worker.adapter_slots,
            adapters=self.dispatcher.adapters_in_use,
        )
        if self.runs_tasks:
            for task in served_tasks(plan.facts, plan.worker.load):
                metrics.of_task(task, is_generated=False)  # counted from zero on

    @property
    def runs_tasks(self) -> bool:
        """Whether its worker runs tasks; else it generates."""
        return self.plan.worker.engine == TASKS

    @property
    def status(self) -> ModelStatus:
        return self.supervisor.status

    @property
    def text(self) -> PromptEncoder:
        """Its tokenizer and template.

        They need no worker: they answer as soon as they are read; ModelNotReady before.
        """
        if self._encoder is None:
            if not self.has_text:
                raise WrongState(f"model {self.plan.name} reads no text", metadata={"state": "NO_TOKENIZER"})
            raise self._not_ready()
        return self._encoder

    @property
    def has_text(self) -> bool:
        """Whether it has a tokenizer that the front can read; models of pictures and sounds may lack one."""
        return not self.runs_tasks or self.plan.facts.has_tokenizer

    @property
    def writing(self) -> WritingModel:
        """How its files say that text is to be written; ModelNotReady before they are read."""
        if self._writing is None:
            raise self._not_ready()
        return self._writing

    def check_generates(self) -> None:
        """Raise WrongState for a model without a head to generate with."""
        if self.runs_tasks:
            text = f"model {self.plan.name} has no head to generate with; RunTask says what it can do"
            raise WrongState(text, metadata={"state": "NO_GENERATION_HEAD"})

    def check_ready(self) -> None:
        """Raise ModelNotReady, or why the model FAILED."""
        if self.status.state is not ModelState.READY:
            raise self._not_ready()

    async def serve(self, threads: ThreadPoolExecutor) -> None:
        """Never returns; cancel it to end the worker."""
        try:
            if self.has_text:
                self._encoder = await PromptEncoder.load(self.plan.folder, threads)
            if not self.runs_tasks:
                self._writing = await asyncio.to_thread(WritingModel.read, self.plan.folder, self.plan.facts)
        except SlipstreamError as error:
            logger.error("model %s: %s", self.plan.name, error.message)
            await self.supervisor.give_up(error)
        await self.supervisor.run()

    @property
    def limits(self) -> ResolveLimits:
        """What bounds a request: also what the worker, once it is ready, can hold."""
        ready = self.status.ready
        capacity = ready.kv_capacity_tokens if ready is not None else 0
        if not 0 < capacity < self._limits.context_tokens:
            return self._limits
        return replace(self._limits, context_tokens=capacity)

    def _not_ready(self) -> SlipstreamError:
        return not_ready(self.status, self.supervisor.retry_after_s)


def _limits(plan: ModelPlan) -> ResolveLimits:
    """A model that does not generate needs no vocabulary."""
    if plan.worker.engine == TASKS and plan.facts.vocab_size is None:
        return ResolveLimits(context_tokens=plan.facts.context_tokens or 0, vocab_size=0)
    return ResolveLimits.of(plan.facts, max_context_tokens=plan.max_context_tokens)
