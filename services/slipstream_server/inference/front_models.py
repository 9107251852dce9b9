"""The models of the front by name: announced, served, gone; which of them a request reaches; who watches them.

Event loop. Never imports torch. Knows nothing of requests but that they ask for a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from slipstream_server.errors import Draining, ModelNotFound, ResourceExists, SlipstreamError, Unavailable
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.expected import ExpectedModels
from slipstream_server.inference.metrics import InferenceMetrics
from slipstream_server.inference.served_model import ModelPlan, ServedModel
from slipstream_server.inference.supervisor import ModelState, ModelStatus, RestartPolicy
from slipstream_server.inference.task_calls import choose_model, served_tasks
from slipstream_server.tasks.specs import TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontConfig:
    """Bounds of the front; those of ``admission`` count for each model."""

    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    tokenizer_threads: int = 2
    write_timeout_s: float = 60.0
    drain_retry_after_s: float = 5.0
    default_model: str = ""
    task_models: Mapping[str, str] = field(default_factory=dict)
    """Task id -> model of requests that name none."""


class FrontModels:
    """What the front knows of models. ``InferenceFront``, which this is a part of, gives it ``_tasks`` to serve them in
    and says when it drains and stops.
    """

    def __init__(self, config: FrontConfig, metrics: InferenceMetrics) -> None:
        self._config = config
        self._metrics = metrics
        self._models: dict[str, ServedModel] = {}
        self._expected = ExpectedModels()
        self._subscribers: set[asyncio.Event] = set()
        self._threads = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="tokenize")
        self._tasks: asyncio.TaskGroup | None = None
        self._is_draining = False
        self._stop = asyncio.Event()

    def announce(self, name: str) -> None:
        """A model is being fetched or prepared: callers are told to wait, not that it is unknown, until it is added."""
        self._expected.announce(name)
        self.notify()

    def report(self, name: str, stage: str, progress: float) -> None:
        """How far an announced model is, 0 to 1."""
        self._expected.report(name, stage, progress)
        self.notify()

    def give_up(self, name: str, error: SlipstreamError) -> None:
        """An announced model cannot come; callers are told why."""
        self._expected.fail(name, error)
        self.notify()

    def rest(self, name: str, state: ModelState = ModelState.UNLOADED, note: str = "") -> None:
        """A model is known, and nobody is bringing it: UNLOADED, or CREATING. Callers are told so."""
        self._expected.rest(name, state, note)
        self.notify()

    def forget(self, name: str) -> None:
        """A model that is not served is known no more."""
        self._expected.arrived(name)
        self._metrics.forget(name)
        self.notify()

    def add_model(self, plan: ModelPlan) -> None:
        """Serve a model from now on; it starts as LOADING.

        Raises ResourceExists, or InvalidField for facts that cannot be served.
        """
        if plan.name in self._models:
            raise ResourceExists(f"model {plan.name} is loaded already")
        self._check_open()
        assert self._tasks is not None, "the front has not been started"
        model = ServedModel(
            plan,
            admission=self._config.admission,
            restart=self._config.restart,
            metrics=self._metrics.of_model(plan.name, max_batch_size=plan.worker.max_batch_size),
            on_change=self.notify,
        )
        self._models[plan.name] = model
        self._expected.arrived(plan.name)
        model.task = self._tasks.create_task(model.serve(self._threads), name=f"model-{plan.name}")
        self.notify()

    def begin_unloading(self, name: str) -> None:
        """No new requests for a served model from here on. Raises ModelNotFound."""
        self._find(name).supervisor.unloading()

    async def remove_model(self, name: str, *, grace_s: float = 0.0) -> None:
        """Stop serving a model: no new requests, the running ones get ``grace_s``. Raises ModelNotFound."""
        model = self._find(name)
        model.supervisor.unloading()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(model.dispatcher.idle(), grace_s)
        model.dispatcher.close(Unavailable(f"model {name} was unloaded"))
        await self._take_down(model)

    async def remove_failed(self, name: str, error: SlipstreamError) -> None:
        """End a model whose load failed; it stays FAILED, without a worker. Raises ModelNotFound."""
        await self._take_down(self._find(name), then=error)

    async def _take_down(self, model: ServedModel, then: SlipstreamError | None = None) -> None:
        name = model.plan.name
        if model.task is not None:
            model.task.cancel()
            await asyncio.gather(model.task, return_exceptions=True)
        if self._models.get(name) is model:
            self._models.pop(name)
            self._metrics.unloaded(name)
            if then is not None:
                self._expected.fail(name, then)
        self.notify()

    def last_used_s(self, name: str) -> float:
        """When a request last came for a served model, on ``time.monotonic``'s clock; at first when it was added."""
        return self._models[name].last_used_s

    def knows(self, name: str) -> bool:
        """Whether there is a model of this name, served or not."""
        return name in self._expected or name in self._models

    def has_given_up(self, name: str) -> bool:
        """Whether a served model FAILED to load, and is not tried again."""
        return name in self._models and self._models[name].supervisor.has_given_up

    def is_served(self, name: str) -> bool:
        """Whether a model is between ``add_model`` and its removal."""
        return name in self._models

    def models(self) -> tuple[ModelStatus, ...]:
        """Every model as it stands, by name."""
        served = (model.status for model in self._models.values())
        return tuple(sorted((*self._expected, *served), key=lambda status: status.model))

    def status(self, name: str) -> ModelStatus:
        """One model as it stands (empty: the default one); raises ModelNotFound."""
        name = name or self._default_model()
        return self._expected[name] if name in self._expected else self._find(name).status

    def plan(self, name: str) -> ModelPlan | None:
        """How a model is served; None while it is only announced. Raises ModelNotFound."""
        return None if name in self._expected else self._find(name).plan

    async def subscribe(self) -> AsyncIterator[tuple[ModelStatus, ...]]:
        """``models()`` now and after every change; changes that come while the reader is busy are one."""
        changed = asyncio.Event()
        self._subscribers.add(changed)
        try:
            while not self._stop.is_set():
                changed.clear()
                yield self.models()
                await changed.wait()
        finally:
            self._subscribers.discard(changed)

    def notify(self) -> None:
        """Something that subscribers show has changed."""
        for changed in self._subscribers:
            changed.set()

    def task_model(self, spec: TaskSpec) -> str:
        """The model of a task request that names none. Raises ModelNotFound or InvalidField."""
        return choose_model(
            spec,
            configured=self._config.task_models,
            default=self._config.default_model,
            able=lambda name: spec.id in self.tasks_of(name),
            known=self._models,
        )

    def tasks_of(self, name: str) -> tuple[str, ...]:
        """The ids of the tasks that a model can do; none while it is only announced. Raises ModelNotFound."""
        plan = self.plan(name)
        return () if plan is None else served_tasks(plan.facts, plan.worker.load)

    def context_tokens(self, model: str) -> int:
        """How many tokens prompt and answer may have together."""
        return self._find(model).limits.context_tokens

    def name_of(self, model: str) -> str:
        """The name of the model that a request naming ``model`` (perhaps nothing) reaches. Raises as ``open`` does."""
        return self._find(model).plan.name

    def _ready(self, name: str) -> ServedModel:
        self._check_open()
        model = self._find(name)
        model.check_ready()
        model.last_used_s = time.monotonic()
        return model

    def _check_open(self) -> None:
        """Raise Draining from ``drain`` on."""
        if self._is_draining:
            raise Draining("the service is going down", retry_after_s=self._config.drain_retry_after_s)

    def _find(self, name: str) -> ServedModel:
        name = name or self._default_model()
        if name in self._expected:
            raise self._expected.why_not(name)
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound.named(name, self._models)
        return model

    def _default_model(self) -> str:
        if self._config.default_model:
            return self._config.default_model
        if len(self._models) != 1:
            raise ModelNotFound("the request names no model and the service has no default one")
        return next(iter(self._models))
