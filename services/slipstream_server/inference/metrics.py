"""Prometheus metrics of the inference front, under vLLM's nouns. Event loop; the registry is the caller's.

Every metric has the label ``model``; those that count tokens and requests also have ``adapter`` (empty: the base
model). Engine totals come from the worker's Stats, which count from the worker's start; here they go on over restarts.
Scrapes come from another thread: what they ask for is copied before it is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slipstream_server.inference.adapter_metrics import AdapterLabels, AdaptersInUse, LoraRequestsInfo
from slipstream_server.inference.gen_ai_metrics import GenAiMetrics
from slipstream_server.inference.generation import Stats
from slipstream_server.inference.task_metrics import TaskMetrics, TaskObserver

Operation = Literal["chat", "text_completion"]
"""What OpenTelemetry calls a generation, by the kind of its prompt."""

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class InferenceMetrics:
    """The collectors of one front."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges: list[Gauge] = []
        self._totals: list[Counter | Histogram] = []

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(f"slipstream_{name}", text, ["model", *labels], registry=registry)
            self._totals.append(made)
            return made

        def gauge(name: str, text: str) -> Gauge:
            made = Gauge(f"slipstream_{name}", text, ["model"], registry=registry)
            self._gauges.append(made)
            return made

        def histogram(name: str, text: str, buckets_s: tuple[float, ...] = _LATENCY_BUCKETS_S) -> Histogram:
            made = Histogram(f"slipstream_{name}", text, ["model"], registry=registry, buckets=buckets_s)
            self._totals.append(made)
            return made

        self.num_requests_running = gauge("num_requests_running", "Requests in the batch.")
        self.num_requests_waiting = gauge("num_requests_waiting", "Requests that have not joined a batch yet.")
        self.max_batch_size = gauge("max_batch_size", "Rows that a batch may have.")
        self.kv_cache_tokens = gauge("kv_cache_tokens", "Tokens whose keys and values the worker holds.")
        self.kv_cache_capacity = gauge("kv_cache_capacity_tokens", "Tokens there is room for; 0: no fixed capacity.")
        self.kv_cache_usage = gauge("kv_cache_usage_ratio", "Used part of the KV cache; 0 without a fixed capacity.")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between tokens.", _TOKEN_BUCKETS_S)
        self.e2e_request_latency = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.request_queue_time = histogram("request_queue_time_seconds", "From arrival to joining a batch.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that joined a batch.", "adapter")
        self.generation_tokens = counter("generation_tokens", "Tokens generated and sent on.", "adapter")
        self.request_success = counter("request_success", "Sequences that ended well.", "adapter", "finish_reason")
        self.request_failure = counter("request_failure", "Requests that failed after admission.", "adapter", "reason")
        self.worker_restarts = counter("worker_restarts", "Workers that died.")
        # By the field of Stats that they follow.
        self.engine_totals = {
            "steps_total": counter("engine_steps", "Steps of the engine."),
            "batch_rows_total": counter("engine_batch_rows", "Rows over all steps of the engine."),
            "prefix_queries_total": counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
            "prefix_hits_total": counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
            "preemptions_total": counter("num_preemptions", "Requests put back because the KV cache was full."),
            "draft_tokens_total": counter("spec_decode_num_draft_tokens", "Tokens that were guessed ahead."),
            "accepted_draft_tokens_total": counter(
                "spec_decode_num_accepted_tokens", "Guessed tokens that were right."
            ),
        }
        self.gen_ai = GenAiMetrics(registry)
        self.tasks = TaskMetrics(registry, self.gen_ai, _LATENCY_BUCKETS_S)
        self.lora_requests = LoraRequestsInfo()
        registry.register(self.lora_requests)

    def of_model(self, model: str, *, max_batch_size: int) -> ModelMetrics:
        self.max_batch_size.labels(model).set(max_batch_size)
        return ModelMetrics(self, model)

    def unloaded(self, model: str) -> None:
        """Gauges of an unloaded model would stand still for ever; its totals stay, for it may come back."""
        for gauge in self._gauges:
            gauge.remove(model)
        self.lora_requests.forget(model)

    def forget(self, model: str) -> None:
        """Drop the totals of a deleted model as well: names that come and go must not add up."""
        self.unloaded(model)
        for total in self._totals:
            total.remove_by_labels({"model": model})
        self.tasks.forget(model)
        self.gen_ai.forget(model)


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, metrics: InferenceMetrics, model: str) -> None:
        self.shared = metrics
        self.model = model
        self.adapters = AdapterLabels()
        self.first_token = metrics.time_to_first_token.labels(model)
        self.inter_token = metrics.inter_token_latency.labels(model)
        self.e2e = metrics.e2e_request_latency.labels(model)
        self.queue_time = metrics.request_queue_time.labels(model)
        self._totals = {field: counter.labels(model) for field, counter in metrics.engine_totals.items()}
        self._restarts = metrics.worker_restarts.labels(model)
        self._last: Stats | None = None
        self._no_kv()

    def watch(
        self,
        *,
        running: Callable[[], int],
        waiting: Callable[[], int],
        adapter_slots: int = 0,
        adapters: Callable[[], AdaptersInUse] = AdaptersInUse,
    ) -> None:
        """Ask these whenever the metrics are read, which is on another thread."""
        self.shared.num_requests_running.labels(self.model).set_function(running)
        self.shared.num_requests_waiting.labels(self.model).set_function(waiting)
        self.shared.lora_requests.watch(self.model, adapter_slots, adapters)

    def of_request(self, adapter_version: str, *, operation: Operation, arrival_s: float) -> RequestMetrics:
        """Who measures one request; ``adapter_version`` is empty for the base model."""
        adapter = self.adapters.of_version(adapter_version)
        return RequestMetrics(self, adapter=adapter, operation=operation, arrival_s=arrival_s)

    def of_task(self, task: str, *, is_generated: bool) -> TaskObserver:
        """Who measures the inputs of one task."""
        return self.shared.tasks.of(self.model, task, is_generated=is_generated)

    def task_joined(self, seconds: float) -> None:
        """Inputs of a task have joined a batch."""
        self.queue_time.observe(seconds)

    def task_tokens(self, prompt_tokens: int) -> None:
        """Inputs of a task had so many tokens. Tasks that a worker answers have no adapter."""
        self.shared.prompt_tokens.labels(self.model, "").inc(prompt_tokens)

    def engine(self, stats: Stats) -> None:
        """Take over what the worker tells."""
        self._kv(stats.kv_tokens, stats.kv_capacity_tokens)
        for field, counter in self._totals.items():
            before = 0 if self._last is None else getattr(self._last, field)
            counter.inc(max(0, getattr(stats, field) - before))
        self._last = stats

    def worker_died(self) -> None:
        """The next worker counts from zero again."""
        self._restarts.inc()
        self._last = None
        self._no_kv()

    def _no_kv(self) -> None:
        self._kv(0, 0)

    def _kv(self, tokens: int, capacity_tokens: int) -> None:
        self.shared.kv_cache_tokens.labels(self.model).set(tokens)
        self.shared.kv_cache_capacity.labels(self.model).set(capacity_tokens)
        self.shared.kv_cache_usage.labels(self.model).set(tokens / capacity_tokens if capacity_tokens else 0.0)


class RequestMetrics:
    """What is measured of one request: a StreamObserver; seconds are monotonic."""

    def __init__(self, of: ModelMetrics, *, adapter: str, operation: Operation, arrival_s: float) -> None:
        self._of = of
        self._adapter = adapter
        self._operation = operation
        self._arrival_s = arrival_s
        self._generated = of.shared.generation_tokens.labels(of.model, adapter)
        self._num_generated = 0
        self._first_token_s: float | None = None

    def joined(self, seconds: float, prompt_tokens: int) -> None:
        self._of.queue_time.observe(seconds)
        self._of.shared.prompt_tokens.labels(self._of.model, self._adapter).inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        self._first_token_s = seconds
        self._of.first_token.observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self._of.inter_token.observe(seconds / count)

    def generated(self, count: int) -> None:
        self._num_generated += count
        self._generated.inc(count)

    def succeeded(self, finish_reasons: tuple[str, ...], seconds: float) -> None:
        self._of.e2e.observe(seconds)
        for reason in finish_reasons:
            self._of.shared.request_success.labels(self._of.model, self._adapter, reason).inc()
        gen_ai = self._of.shared.gen_ai.of(self._of.model, self._operation)
        gen_ai.ended(seconds)
        if self._first_token_s is not None:
            gen_ai.first_token(self._first_token_s)
            # Sequences of one request run side by side.
            tokens_after_first = self._num_generated / len(finish_reasons) - 1
            if tokens_after_first > 0:
                gen_ai.per_output_token((seconds - self._first_token_s) / tokens_after_first)

    def failed(self, reason: str) -> None:
        self._of.shared.request_failure.labels(self._of.model, self._adapter, reason).inc()
        seconds = time.monotonic() - self._arrival_s
        self._of.shared.gen_ai.of(self._of.model, self._operation).ended(seconds, error_type=reason)
