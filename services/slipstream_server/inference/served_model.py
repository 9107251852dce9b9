"""One model of the front: its tokenizer, its queue, its worker. One task of the front runs ``serve``; event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.dispatcher import Dispatcher
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.inference.prompts import PromptEncoder
from slipstream_server.inference.resolve import ResolveLimits
from slipstream_server.inference.supervisor import ModelState, ModelStatus, RestartPolicy, WorkerSupervisor, not_ready
from slipstream_server.inference.worker_config import WorkerConfig, worker_command
from slipstream_server.inference.worker_process import WorkerLaunch
from slipstream_server.models.facts import ModelFacts

_log = logging.getLogger(__name__)


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
        self.limits = ResolveLimits.of(plan.facts, max_context_tokens=plan.max_context_tokens)
        self.metrics = metrics
        self.dispatcher = Dispatcher(limits=admission, max_rows=2 * plan.worker.max_batch_size)
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
        metrics.watch(
            running=lambda: self.dispatcher.num_running,
            waiting=lambda: self.dispatcher.num_waiting,
            adapter_slots=plan.worker.adapter_slots,
            adapters=self.dispatcher.adapters_in_use,
        )

    @property
    def status(self) -> ModelStatus:
        return self.supervisor.status

    @property
    def text(self) -> PromptEncoder:
        """Its tokenizer and template.

        They need no worker: they answer as soon as they are read; ModelNotReady before.
        """
        if self._encoder is None:
            raise self._not_ready()
        return self._encoder

    def check_ready(self) -> None:
        """Raise ModelNotReady, or why the model FAILED."""
        if self.status.state is not ModelState.READY:
            raise self._not_ready()

    async def serve(self, threads: ThreadPoolExecutor) -> None:
        """Never returns; cancel it to end the worker."""
        try:
            self._encoder = await PromptEncoder.load(self.plan.folder, threads)
        except SlipstreamError as error:
            _log.error("model %s: %s", self.plan.name, error.message)
            await self.supervisor.give_up(error)
        await self.supervisor.run()

    def _not_ready(self) -> SlipstreamError:
        return not_ready(self.status, self.supervisor.retry_after_s)
