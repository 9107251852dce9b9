"""From the samples of two moments to what a model is doing: rates, ratios and quantiles. Pure; knows no terminal.

Rates are those between the last two samples. Quantiles and ratios are of the last minute (``WINDOW_S``), or since the
service began where only two samples are taken. Quantiles are interpolated in their bucket as Prometheus'
histogram_quantile does: https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from slipstream_client.cli.metrics_port import Samples, total

WINDOW_S = 60.0
HISTORY = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds; None while nothing was measured."""

    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """One model. What is None cannot be known yet, or does not apply.

    ``batch_rows``: mean rows of a step since the last sample. Histories: tokens per second, oldest first.
    """

    model: str
    num_running: int
    num_waiting: int
    batch_rows: float | None
    max_batch_size: int
    kv_tokens: int
    kv_capacity_tokens: int
    kv_usage_ratio: float | None
    prefix_hit_ratio: float | None
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    prompt_history: tuple[float, ...]
    generation_history: tuple[float, ...]
    first_token: Latency
    inter_token: Latency
    num_succeeded: int
    num_failed: int
    num_preemptions: int
    num_draft_tokens: int
    draft_acceptance_ratio: float | None
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    adapter_slots: int
    num_worker_restarts: int
    tasks: TaskFigures | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFigures:
    """What a model that answers tasks and generates nothing does. Inputs are counted, whatever their size."""

    inputs_per_s: float | None
    history: tuple[float, ...]
    latency: Latency
    queue_time: Latency
    num_answered: int
    num_failed: int


@dataclass(frozen=True, slots=True)
class Moment:
    """Samples and the monotonic time at which they were taken."""

    time_s: float
    samples: Samples


class Recorder:
    """Takes samples one after the other, and tells the figures of the last one.

    ``window_s`` None: quantiles and ratios since the service began.
    """

    def __init__(self, window_s: float | None = WINDOW_S) -> None:
        self._window_s = window_s
        self._moments: deque[Moment] = deque()
        self._histories: dict[str, tuple[deque[float], deque[float], deque[float]]] = {}

    def take(self, time_s: float, samples: Samples) -> tuple[ModelFigures, ...]:
        """The figures of every model now, by name."""
        now = Moment(time_s, samples)
        before = self._moments[-1] if self._moments else None
        self._moments.append(now)
        # Two stay, however far apart they are.
        while (
            self._window_s is not None and len(self._moments) > 2 and time_s - self._moments[0].time_s > self._window_s
        ):
            self._moments.popleft()
        start = Moment(0.0, ()) if self._window_s is None else self._moments[0]
        self._histories = {model: self._histories.get(model, _new_history()) for model in _models(samples)}
        return tuple(self._figures(model, before, now, start) for model in _models(samples))

    def _figures(self, model: str, before: Moment | None, now: Moment, start: Moment) -> ModelFigures:
        step = None if before is None else Span(before, now, model)
        window = Span(start, now, model)
        labels = _adapter_labels(now.samples, model)
        kv_tokens, kv_capacity = window.count("kv_cache_tokens"), window.count("kv_cache_capacity_tokens")
        prompt_rate = step.rate("prompt_tokens_total") if step else None
        generation_rate = step.rate("generation_tokens_total") if step else None
        prompts, generations, inputs = self._histories[model]
        if prompt_rate is not None and generation_rate is not None:
            prompts.append(prompt_rate)
            generations.append(generation_rate)
        return ModelFigures(
            model=model,
            num_running=window.count("num_requests_running"),
            num_waiting=window.count("num_requests_waiting"),
            batch_rows=step.ratio("engine_batch_rows_total", "engine_steps_total") if step else None,
            max_batch_size=window.count("max_batch_size"),
            kv_tokens=kv_tokens,
            kv_capacity_tokens=kv_capacity,
            kv_usage_ratio=kv_tokens / kv_capacity if kv_capacity else None,
            prefix_hit_ratio=window.ratio("prefix_cache_hits_total", "prefix_cache_queries_total"),
            prompt_tokens_per_s=prompt_rate,
            generation_tokens_per_s=generation_rate,
            prompt_history=tuple(prompts),
            generation_history=tuple(generations),
            first_token=window.latency("time_to_first_token_seconds"),
            inter_token=window.latency("inter_token_latency_seconds"),
            num_succeeded=window.count("e2e_request_latency_seconds_count"),
            num_failed=window.count("request_failure_total"),
            num_preemptions=window.count("num_preemptions_total"),
            num_draft_tokens=window.count("spec_decode_num_draft_tokens_total"),
            draft_acceptance_ratio=window.ratio(
                "spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"
            ),
            running_adapters=_listed(labels.get("running_lora_adapters", "")),
            waiting_adapters=_listed(labels.get("waiting_lora_adapters", "")),
            adapter_slots=int(labels.get("max_lora") or 0),
            num_worker_restarts=window.count("worker_restarts_total"),
            tasks=_task_figures(step, window, inputs) if _only_runs_tasks(now.samples, model) else None,
        )


def _task_figures(step: Span | None, window: Span, history: deque[float]) -> TaskFigures:
    per_s = step.rate("task_inputs_total") if step else None
    if per_s is not None:
        history.append(per_s)
    answered = window.count("task_inputs_total", reason="")
    return TaskFigures(
        inputs_per_s=per_s,
        history=tuple(history),
        latency=window.latency("task_latency_seconds"),
        queue_time=window.latency("request_queue_time_seconds"),
        num_answered=answered,
        num_failed=window.count("task_inputs_total") - answered,
    )


class Span:
    """One model's metrics between two moments."""

    def __init__(self, before: Moment, now: Moment, model: str) -> None:
        self._before = _of_model(before.samples, model)
        self._now = _of_model(now.samples, model)
        self._seconds = now.time_s - before.time_s

    def count(self, name: str, **labels: str) -> int:
        """The value at the end."""
        return round(total(self._now, f"slipstream_{name}", **labels) or 0)

    def grown(self, name: str) -> float:
        """How much a counter has grown; one that is smaller than before is that of a service started anew."""
        before, now = (total(samples, f"slipstream_{name}") or 0.0 for samples in (self._before, self._now))
        return now - before if now >= before else now

    def rate(self, name: str) -> float | None:
        """Growth per second."""
        return self.grown(name) / self._seconds if self._seconds > 0 else None

    def ratio(self, part: str, whole: str) -> float | None:
        """Growth of ``part`` over that of ``whole``; None where that did not grow."""
        grown = self.grown(whole)
        return self.grown(part) / grown if grown else None

    def latency(self, name: str) -> Latency:
        """Quantiles of what the histogram has seen in between."""
        before, now = (_buckets(samples, f"slipstream_{name}_bucket") for samples in (self._before, self._now))
        is_new = any(count < before.get(bound, 0.0) for bound, count in now.items())
        seen = now if is_new else {bound: count - before.get(bound, 0.0) for bound, count in now.items()}
        return Latency(p50_s=quantile(seen.items(), 0.5), p99_s=quantile(seen.items(), 0.99))


def quantile(buckets: Iterable[tuple[float, float]], q: float) -> float | None:
    """The ``q``-quantile of a histogram of (upper bound, cumulative count); None of an empty one.

    Within a bucket values count as evenly spread, the lowest one begins at 0. Beyond the last finite bound nothing is
    known but that bound.
    """
    ordered = sorted(buckets)
    rank = q * ordered[-1][1] if ordered else 0.0
    if not rank:
        return None
    for (lower, below), (upper, count) in itertools.pairwise([(0.0, 0.0), *ordered]):
        if count >= rank:
            return lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / (count - below)
    return None


def _models(samples: Samples) -> list[str]:
    return sorted({s.labels["model"] for s in samples if s.name == "slipstream_num_requests_running"})


def _only_runs_tasks(samples: Samples, model: str) -> bool:
    """A model that generates has counted tokens before the task that they are for has its result."""
    names = {sample.name for sample in _of_model(samples, model)}
    return "slipstream_task_inputs_total" in names and "slipstream_generation_tokens_total" not in names


def _of_model(samples: Samples, model: str) -> Samples:
    return tuple(sample for sample in samples if sample.labels.get("model") == model)


def _adapter_labels(samples: Samples, model: str) -> dict[str, str]:
    infos = [s for s in _of_model(samples, model) if s.name == "slipstream_lora_requests_info"]
    return dict(max(infos, key=lambda info: info.value).labels) if infos else {}


def _listed(names: str) -> tuple[str, ...]:
    return tuple(filter(None, names.split(",")))


def _buckets(samples: Samples, name: str) -> dict[float, float]:
    """Upper bound to count, over all tasks of a model."""
    found: dict[float, float] = {}
    for sample in samples:
        if sample.name == name:
            bound = float(sample.labels["le"])
            found[bound] = found.get(bound, 0.0) + sample.value
    return found


def _new_history() -> tuple[deque[float], deque[float], deque[float]]:
    return deque(maxlen=HISTORY), deque(maxlen=HISTORY), deque(maxlen=HISTORY)
