"""Keeps one model's worker alive: starts it, passes its events on, starts another when it dies.

Deaths are answered with exponentially longer pauses; after too many without a stable life between them the model is
FAILED, its requests are failed with the reason, and a new worker is tried only now and then. Requests that wait for the
next worker and whose deadline is nearer than it can be ready are refused at once. A model that cannot be loaded at all
stays FAILED until somebody unloads it; one that had been ready before is tried again.

One task of the front runs ``run`` until it is cancelled; the worker ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from slipstream_server.errors import ModelNotReady, SlipstreamError, WorkerDied
from slipstream_server.inference.dispatcher import Dispatcher
from slipstream_server.inference.engines import CONTINUOUS
from slipstream_server.inference.generation import Event, LoadFailed, Loading, Ready, Stats
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.inference.worker_errors import error_of
from slipstream_server.inference.worker_process import WorkerGone, WorkerLaunch, WorkerProcess, spawn_worker
from slipstream_server.storage.columns import utc_now

logger = logging.getLogger(__name__)

# Bounds of what callers are told of a load: the next one may be quicker, and asking again costs little.
_LEAST_LOADING_S, _MOST_LOADING_S = 2.0, 15.0


class ModelState(StrEnum):
    """What a model can do for a caller now."""

    UNLOADED = "unloaded"
    CREATING = "creating"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model as others see it.

    ``progress`` (0 to 1) and ``stage`` tell of a load under way; ``error`` why it FAILED.
    """

    model: str
    state: ModelState = ModelState.LOADING
    progress: float = 0.0
    stage: str = ""
    error: SlipstreamError | None = None
    ready: Ready | None = None
    ready_time: datetime | None = None
    stats: Stats | None = None
    num_deaths: int = 0
    worker_pid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Pauses between a death and the next start, and when to stop hoping."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    stable_after_s: float = 60.0
    crash_loop_deaths: int = 5
    slow_retry_s: float = 60.0

    def delay_s(self, deaths_in_a_row: int) -> float:
        if deaths_in_a_row >= self.crash_loop_deaths:
            return self.slow_retry_s
        return min(self.first_delay_s * 2.0 ** (deaths_in_a_row - 1), self.max_delay_s)


class _CannotLoad(Exception):
    def __init__(self, error: SlipstreamError) -> None:
        super().__init__(error.message)
        self.error = error


class WorkerSupervisor:
    """The lives of one model's workers."""

    def __init__(
        self,
        *,
        status: ModelStatus,
        launch: WorkerLaunch,
        dispatcher: Dispatcher,
        policy: RestartPolicy,
        metrics: ModelMetrics,
        on_change: Callable[[], None],
    ) -> None:
        self.status = status
        self._launch = launch
        self._dispatcher = dispatcher
        self._policy = policy
        self._metrics = metrics
        self._on_change = on_change
        self._deaths_in_a_row = 0
        self._began_at_s = 0.0
        self._ready_at_s: float | None = None
        self._load_s = 0.0
        self._was_ready = False
        self.has_given_up = False

    @property
    def retry_after_s(self) -> float:
        """When a caller who found the model not ready may try again: by how long it took to load before."""
        loading_s = min(max(_LEAST_LOADING_S, self._load_s), _MOST_LOADING_S)
        return loading_s + (self._policy.delay_s(self._deaths_in_a_row) if self._deaths_in_a_row else 0.0)

    async def run(self) -> None:
        """Never returns; cancel it to end the worker."""
        while True:
            try:
                await self._one_life()
            except WorkerGone as death:
                await self._after_death(str(death))
            except _CannotLoad as failure:
                await self._after_failed_load(failure.error)

    def fail(self, error: SlipstreamError) -> None:
        """The model cannot answer: say so, and end what waits for it."""
        self._change(state=ModelState.FAILED, error=error, worker_pid=None)
        self._dispatcher.fail_all(error)

    async def give_up(self, error: SlipstreamError) -> None:
        """The model cannot answer, and trying again would not help. Never returns."""
        self.has_given_up = True
        self.fail(error)
        self._dispatcher.close(error)
        await asyncio.Event().wait()

    def unloading(self) -> None:
        self._change(state=ModelState.UNLOADING)

    async def _one_life(self) -> None:
        self._began_at_s, self._ready_at_s = time.monotonic(), None
        try:
            async with spawn_worker(self._launch) as worker:
                self._change(worker_pid=worker.pid)
                async for events in worker.events():
                    for event in events:
                        self._take(event, worker)
        except OSError as error:
            raise WorkerGone(f"could not be started ({error.strerror})") from error
        finally:
            self._dispatcher.disconnect()

    def _take(self, event: Event, worker: WorkerProcess) -> None:
        match event:
            case Loading():
                self._change(progress=event.fraction, stage=event.stage)
            case Ready():
                self._was_ready = True
                self._ready_at_s = time.monotonic()
                self._load_s = self._ready_at_s - self._began_at_s
                self._change(
                    state=ModelState.READY, progress=1.0, stage="", error=None, ready=event, ready_time=utc_now()
                )
                logger.info("model %s is ready on %s", self.status.model, event.device)
                self._dispatcher.connect(worker.send, searches_beside=event.batching == CONTINUOUS)
            case LoadFailed():
                raise _CannotLoad(error_of(event.reason, event.message, event.field))
            case Stats():
                has_news = self.status.stats is None or self.status.stats.adapters != event.adapters
                self.status = replace(self.status, stats=event)
                if has_news:
                    self._on_change()
                self._metrics.engine(event)
            case _:
                self._dispatcher.handle(event)

    async def _after_death(self, how: str) -> None:
        if self._ready_at_s is not None and time.monotonic() - self._ready_at_s >= self._policy.stable_after_s:
            self._deaths_in_a_row = 0
        self._deaths_in_a_row += 1
        self._metrics.worker_died()
        delay_s = self._policy.delay_s(self._deaths_in_a_row)
        self.status = replace(
            self.status, num_deaths=self.status.num_deaths + 1, worker_pid=None, ready=None, stats=None
        )
        logger.error("worker of model %s %s; the next one starts in %.1f s", self.status.model, how, delay_s)
        if self._deaths_in_a_row >= self._policy.crash_loop_deaths:
            text = f"{self._deaths_in_a_row} workers died in a row; the last one {how}"
            self.fail(WorkerDied(text, retry_after_s=delay_s))
        else:
            self._change(state=ModelState.RESTARTING, progress=0.0, stage=f"worker {how}")
            # The next one takes as long as this one took: who cannot wait that long is told now.
            again_s = time.monotonic() + delay_s + self._load_s
            self._dispatcher.refuse_hopeless(again_s, not_ready(self.status, self.retry_after_s))
        await asyncio.sleep(delay_s)

    async def _after_failed_load(self, error: SlipstreamError) -> None:
        logger.error("model %s cannot be loaded: %s", self.status.model, error.message)
        self.fail(error)
        if self._was_ready:
            await asyncio.sleep(self._policy.slow_retry_s)
        else:
            await self.give_up(error)

    def _change(self, **changes: object) -> None:
        self.status = replace(self.status, **changes)  # type: ignore[arg-type]
        self._on_change()


def not_ready(status: ModelStatus, retry_after_s: float) -> SlipstreamError:
    """What a caller is told of a model that is not READY."""
    if status.state is ModelState.FAILED and status.error is not None:
        error = status.error
        return type(error)(error.message, metadata=error.metadata, retry_after_s=error.retry_after_s)
    text = f"model {status.model} is {status.state}"
    if status.state is ModelState.LOADING and status.stage:
        text += f" ({status.progress:.0%}, {status.stage})"
    if status.state is ModelState.UNLOADED:
        return ModelNotReady(f"{text}; LoadModel makes it ready", metadata={"state": status.state.upper()})
    return ModelNotReady(text, metadata={"state": status.state.upper()}, retry_after_s=retry_after_s)
