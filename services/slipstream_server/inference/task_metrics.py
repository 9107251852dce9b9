"""Prometheus metrics of the classic tasks, by model and task. Event loop; part of ``metrics``.

    slipstream_task_latency_seconds     from an input's arrival to its result, also where that is an error
    slipstream_task_inputs_total        inputs with a result; ``reason`` is empty where it is no error

What a worker answers also counts as gen_ai.server.request.duration. What is written by the generation path is counted
there as well, like any other generation.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from slipstream_server.inference.gen_ai_metrics import GenAiMetrics

# OpenTelemetry has a word for one of the tasks; the others are called by their ids.
_OPERATIONS = {"feature-extraction": "embeddings"}


class TaskMetrics:
    """The collectors of one front."""

    def __init__(self, registry: CollectorRegistry, gen_ai: GenAiMetrics, buckets_s: tuple[float, ...]) -> None:
        labels = ("model", "task")
        self.latency = Histogram(
            "slipstream_task_latency_seconds", "From an input to its result.", labels, registry=registry,
            buckets=buckets_s,
        )  # fmt: skip
        self.inputs = Counter(
            "slipstream_task_inputs", "Inputs of tasks that have a result.", (*labels, "reason"), registry=registry
        )
        self.gen_ai = gen_ai

    def of(self, model: str, task: str, *, is_generated: bool) -> TaskObserver:
        """Who measures one task on one model; its series begin at zero with the first call of this."""
        return TaskObserver(self, model, task, is_generated=is_generated)

    def forget(self, model: str) -> None:
        self.latency.remove_by_labels({"model": model})
        self.inputs.remove_by_labels({"model": model})


class TaskObserver:
    """The metrics of one task on one model."""

    def __init__(self, of: TaskMetrics, model: str, task: str, *, is_generated: bool) -> None:
        self._of = of
        self._labels = (model, task)
        self._latency = of.latency.labels(model, task)
        self._succeeded = of.inputs.labels(model, task, "")
        self._gen_ai = None if is_generated else of.gen_ai.of(model, _OPERATIONS.get(task, task))

    def answered(self, seconds: float, reason: str = "") -> None:
        """An input has its result after ``seconds``; ``reason`` of an error."""
        self._latency.observe(seconds)
        (self._of.inputs.labels(*self._labels, reason) if reason else self._succeeded).inc()
        if self._gen_ai is not None:
            self._gen_ai.ended(seconds, error_type=reason)
