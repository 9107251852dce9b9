"""Prometheus metrics of the inference front, under vLLM's nouns. Event loop; the registry is the caller's.

Every metric has the label ``model``. Engine totals come from the worker's Stats, which count from the worker's start;
here they go on over restarts.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from slipstream_server.inference.generation import Stats

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class InferenceMetrics:
    """The collectors of one front."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"slipstream_{name}", text, ["model", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"slipstream_{name}", text, ["model"], registry=registry)

        def histogram(name: str, text: str, buckets_s: tuple[float, ...] = _LATENCY_BUCKETS_S) -> Histogram:
            return Histogram(f"slipstream_{name}", text, ["model"], registry=registry, buckets=buckets_s)

        self.num_requests_running = gauge("num_requests_running", "Requests in the worker.")
        self.num_requests_waiting = gauge("num_requests_waiting", "Requests in the queue before the worker.")
        self.kv_cache_tokens = gauge("kv_cache_tokens", "Tokens whose keys and values the worker holds.")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between tokens.", _TOKEN_BUCKETS_S)
        self.e2e_request_latency = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.request_queue_time = histogram("request_queue_time_seconds", "From arrival to joining a batch.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that succeeded.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated and sent on.")
        self.request_success = counter("request_success", "Sequences that ended well.", "finish_reason")
        self.request_failure = counter("request_failure", "Requests that failed after admission.", "reason")
        self.worker_restarts = counter("worker_restarts", "Workers that died.")
        self.engine_steps = counter("engine_steps", "Steps of the engine.")
        self.engine_batch_rows = counter("engine_batch_rows", "Rows over all steps of the engine.")
        self._per_model = (
            self.num_requests_running,
            self.num_requests_waiting,
            self.kv_cache_tokens,
        )

    def of_model(self, model: str) -> ModelMetrics:
        return ModelMetrics(self, model)

    def forget(self, model: str) -> None:
        """Gauges of an unloaded model would stand still for ever."""
        for gauge in self._per_model:
            gauge.remove(model)


class ModelMetrics:
    """The metrics of one model; a StreamObserver."""

    def __init__(self, metrics: InferenceMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._kv_tokens = metrics.kv_cache_tokens.labels(model)
        self._first_token = metrics.time_to_first_token.labels(model)
        self._inter_token = metrics.inter_token_latency.labels(model)
        self._e2e = metrics.e2e_request_latency.labels(model)
        self._queue_time = metrics.request_queue_time.labels(model)
        self._generated = metrics.generation_tokens.labels(model)
        self._prompt = metrics.prompt_tokens.labels(model)
        self._steps = metrics.engine_steps.labels(model)
        self._rows = metrics.engine_batch_rows.labels(model)
        self._last_steps = 0
        self._last_rows = 0

    def watch(self, *, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Ask these whenever the metrics are read."""
        self._metrics.num_requests_running.labels(self._model).set_function(running)
        self._metrics.num_requests_waiting.labels(self._model).set_function(waiting)

    def engine(self, stats: Stats) -> None:
        self._kv_tokens.set(stats.kv_tokens)
        self._steps.inc(_grown(self._last_steps, stats.steps_total))
        self._rows.inc(_grown(self._last_rows, stats.batch_rows_total))
        self._last_steps, self._last_rows = stats.steps_total, stats.batch_rows_total

    def worker_died(self) -> None:
        self._metrics.worker_restarts.labels(self._model).inc()

    def queued(self, seconds: float) -> None:
        self._queue_time.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self._inter_token.observe(seconds / count)

    def generated(self, count: int) -> None:
        self._generated.inc(count)

    def succeeded(self, finish_reasons: tuple[str, ...], seconds: float, prompt_tokens: int) -> None:
        self._e2e.observe(seconds)
        self._prompt.inc(prompt_tokens)
        for reason in finish_reasons:
            self._metrics.request_success.labels(self._model, reason).inc()

    def failed(self, reason: str) -> None:
        self._metrics.request_failure.labels(self._model, reason).inc()


def _grown(before: int, now: int) -> int:
    """How much a total has grown; a smaller one is that of a new worker."""
    return now - before if now >= before else now
