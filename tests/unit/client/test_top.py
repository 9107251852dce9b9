"""The figures and the picture of ``slipstream top``, from samples worked out by hand."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry, Histogram
from rich.console import Console

from slipstream_client.cli.metrics_port import MetricsUnavailable, Sample, Samples, metrics_address, read_metrics
from slipstream_client.cli.top_figures import Latency, ModelFigures, Recorder, TaskFigures, quantile
from slipstream_client.cli.top_view import Frame, TopView, bar, in_time, sparkline
from slipstream_client.results import HealthState, ServiceHealth
from slipstream_client.settings import ClientSettings

FIRST_TOKEN = "time_to_first_token_seconds_bucket"


def samples(model: str = "m", **values: float) -> list[Sample]:
    """The series that are always there, and ``values`` by their names."""
    named = {"num_requests_running": 0.0, "num_requests_waiting": 0.0, "max_batch_size": 8.0, **values}
    return [Sample(f"slipstream_{name}", {"model": model}, value) for name, value in named.items()]


def buckets(*counts: tuple[str, float]) -> list[Sample]:
    return [Sample(f"slipstream_{FIRST_TOKEN}", {"model": "m", "le": bound}, count) for bound, count in counts]


def one(recorder: Recorder, time_s: float, *parts: list[Sample]) -> ModelFigures:
    taken: Samples = tuple(sample for part in parts for sample in part)
    (figures,) = recorder.take(time_s, taken)
    return figures


def test_quantiles_are_interpolated_in_their_bucket() -> None:
    # 10 values up to 1, 10 more up to 2: the 15th lies halfway through the second bucket, the 5th through the first.
    seen = [(2.0, 20.0), (1.0, 10.0), (math.inf, 20.0)]
    assert quantile(seen, 0.75) == 1.5
    assert quantile(seen, 0.25) == 0.5
    assert quantile(seen, 1.0) == 2.0


def test_quantiles_beyond_the_last_bound_are_that_bound_and_of_nothing_none() -> None:
    assert quantile([(1.0, 1.0), (math.inf, 10.0)], 0.99) == 1.0
    assert quantile([(1.0, 0.0), (math.inf, 0.0)], 0.5) is None
    assert quantile([], 0.5) is None


def test_quantiles_lie_in_the_bucket_of_the_true_ones() -> None:
    bounds = (0.1, 0.2, 0.5, 1.0, 2.0)
    histogram = Histogram("h", "h", registry=CollectorRegistry(), buckets=bounds)
    values = sorted((number * 37 % 1000) / 600 for number in range(1, 1001))
    for value in values:
        histogram.observe(value)
    counted = [(float(s.labels["le"]), s.value) for f in histogram.collect() for s in f.samples if s.name == "h_bucket"]
    for q in (0.1, 0.5, 0.9, 0.99):
        true, found = values[math.ceil(q * len(values)) - 1], quantile(counted, q)
        upper = next(bound for bound in bounds if bound >= true)
        lower = max((bound for bound in bounds if bound < true), default=0.0)
        assert found is not None
        assert lower <= found <= upper


def test_rates_and_ratios_are_those_between_two_looks() -> None:
    recorder = Recorder()
    first = one(recorder, 10.0, samples(generation_tokens_total=100, engine_steps_total=10, engine_batch_rows_total=40))
    assert (first.generation_tokens_per_s, first.batch_rows, first.generation_history) == (None, None, ())
    second = one(
        recorder, 12.0,
        samples(generation_tokens_total=150, engine_steps_total=20, engine_batch_rows_total=100, num_requests_waiting=3,
                prefix_cache_queries_total=200, prefix_cache_hits_total=50, kv_cache_tokens=64,
                kv_cache_capacity_tokens=256),
    )  # fmt: skip
    assert second.generation_tokens_per_s == 25
    assert second.generation_history == (25,)
    assert second.batch_rows == 6
    assert second.num_waiting == 3
    assert second.prefix_hit_ratio == 0.25
    assert second.kv_usage_ratio == 0.25
    assert second.draft_acceptance_ratio is None


def test_adapters_of_one_model_are_summed_and_other_models_left_out() -> None:
    recorder = Recorder()
    one(recorder, 0.0, samples())
    labels = [{"model": "m", "adapter": "a"}, {"model": "m", "adapter": ""}, {"model": "n", "adapter": ""}]
    more = [Sample("slipstream_generation_tokens_total", each, 10.0) for each in labels]
    assert one(recorder, 1.0, samples(), more).generation_tokens_per_s == 20


def task_samples(answered: float, failed: float, *counts: tuple[str, float]) -> list[Sample]:
    """A model of two tasks, of which one has been asked for."""
    found = [
        Sample("slipstream_task_inputs_total", {"model": "m", "task": task, "reason": reason}, value)
        for task, reason, value in (("ner", "", answered), ("ner", "PROMPT_TOO_LONG", failed), ("fill-mask", "", 0.0))
    ]
    for task, share in (("ner", 1.0), ("fill-mask", 0.0)):
        for bound, value in counts:
            labels = {"model": "m", "task": task, "le": bound}
            found.append(Sample("slipstream_task_latency_seconds_bucket", labels, share * value))
    return found


def test_a_model_of_tasks_is_told_by_its_inputs_whatever_their_task() -> None:
    recorder = Recorder()
    before = one(recorder, 0.0, samples(), task_samples(100, 1, ("1.0", 50), ("2.0", 100), ("+Inf", 100)))
    assert before.tasks is not None
    assert (before.tasks.inputs_per_s, before.tasks.num_answered, before.tasks.num_failed) == (None, 100, 1)
    after = one(recorder, 2.0, samples(), task_samples(139, 2, ("1.0", 50), ("2.0", 140), ("+Inf", 140)))
    assert after.tasks is not None
    assert (after.tasks.inputs_per_s, after.tasks.history) == (20, (20,))
    assert after.tasks.latency == Latency(p50_s=1.5, p99_s=1.99)
    assert one(Recorder(), 0.0, samples()).tasks is None
    both = one(Recorder(), 0.0, samples(generation_tokens_total=1), task_samples(1, 0))
    assert both.tasks is None  # its tasks are generations, which are told already


def test_a_service_started_anew_does_not_run_backwards() -> None:
    recorder = Recorder()
    one(recorder, 0.0, samples(generation_tokens_total=1000), buckets(("1.0", 50), ("+Inf", 50)))
    after = one(recorder, 2.0, samples(generation_tokens_total=30), buckets(("1.0", 4), ("+Inf", 4)))
    assert after.generation_tokens_per_s == 15
    assert after.first_token.p50_s == 0.5


def test_latencies_are_of_the_last_minute_only() -> None:
    recorder = Recorder(window_s=60.0)
    one(recorder, 0.0, samples(), buckets(("1.0", 0), ("2.0", 100), ("+Inf", 100)))
    early = one(recorder, 30.0, samples(), buckets(("1.0", 0), ("2.0", 200), ("+Inf", 200)))
    assert early.first_token == Latency(p50_s=1.5, p99_s=1.99)
    one(recorder, 50.0, samples(), buckets(("1.0", 0), ("2.0", 200), ("+Inf", 200)))
    late = one(recorder, 100.0, samples(), buckets(("1.0", 10), ("2.0", 210), ("+Inf", 210)))
    assert late.first_token.p50_s == 0.5
    since_start = Recorder(window_s=None)
    assert one(since_start, 0.0, samples(), buckets(("1.0", 100), ("+Inf", 100))).first_token.p50_s == 0.5


def test_the_latest_word_on_adapters_counts() -> None:
    def info(running: str, at_s: float) -> Sample:
        labels = {"model": "m", "running_lora_adapters": running, "waiting_lora_adapters": "", "max_lora": "4"}
        return Sample("slipstream_lora_requests_info", labels, at_s)

    figures = one(Recorder(), 0.0, samples(), [info("old", 1.0), info("legal,tone", 2.0)])
    assert (figures.running_adapters, figures.waiting_adapters, figures.adapter_slots) == (("legal", "tone"), (), 4)


FIGURES = ModelFigures(
    model="smollm2", num_running=10, num_waiting=4, batch_rows=9.6, max_batch_size=16, kv_tokens=5123,
    kv_capacity_tokens=16384, kv_usage_ratio=5123 / 16384, prefix_hit_ratio=0.62, prompt_tokens_per_s=1204.0,
    generation_tokens_per_s=123.4, prompt_history=(1000.0, 1204.0), generation_history=(0.0, 60.0, 123.4),
    first_token=Latency(p50_s=0.12, p99_s=1.48), inter_token=Latency(p50_s=0.0182, p99_s=0.0424), num_succeeded=1234,
    num_failed=3, num_preemptions=7, num_draft_tokens=1200, draft_acceptance_ratio=0.61,
    running_adapters=("support", "tone"), waiting_adapters=("legal",), adapter_slots=8, num_worker_restarts=2,
)  # fmt: skip
SERVICES = tuple(
    ServiceHealth(service=name, address="host:50051", state=state, latency_ms=1.2)
    for name, state in (("inference", HealthState.SERVING), ("training", HealthState.UNREACHABLE))
)


def drawn(*figures: ModelFigures, problem: str = "") -> str:
    """What an 80 x 24 terminal without colour shows."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(file=file, width=80, height=24, force_terminal=True, no_color=True, color_system=None)
    frame = Frame(time=datetime.now(UTC), services=SERVICES, models=(), figures=figures, problem=problem)
    console.print(TopView(frame))
    file.seek(0)
    return file.read()


def test_a_card_tells_everything_without_colour_in_80_columns() -> None:
    text = drawn(FIGURES)
    for words in (
        "9.6 of 16 rows", "10 running", "4 waiting", "31%", "5.12K of 16.4K tokens", "prefix hits 62%", "123 tok/s",
        "1.2K tok/s", "first token 120 ms / 1.48 s", "next 18.2 ms / 42.4 ms", "1.23K done", "3 failed", "7 preempted",
        "2 restarts", "drafts 61% accepted", "2 of 8 in use", "support tone", "waiting: legal", "not running",
    ):  # fmt: skip
        assert words in text, words
    assert "\x1b[3" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_card_of_a_model_of_tasks_has_no_line_that_it_cannot_fill() -> None:
    tasks = TaskFigures(
        inputs_per_s=812.0, history=(0.0, 400.0, 812.0), latency=Latency(p50_s=0.012, p99_s=0.21),
        queue_time=Latency(p50_s=0.004, p99_s=0.1), num_answered=52_000, num_failed=4,
    )  # fmt: skip
    text = drawn(replace(FIGURES, tasks=tasks, adapter_slots=0))
    for words in (
        "9.6 of 16 rows", "812 in/s", "1.2K tok/s", "result 12 ms / 210 ms", "queue 4 ms / 100 ms", "52K done",
        "4 failed", "2 restarts",
    ):  # fmt: skip
        assert words in text, words
    for words in ("KV cache", "first token", "preempted", "drafts"):
        assert words not in text, words
    table = drawn(*(replace(FIGURES, model=f"model-{number}", tasks=tasks) for number in range(12)))
    assert "210 ms" in table
    assert max(map(len, (text + table).splitlines())) <= 80


def test_many_models_fit_the_screen_as_a_table() -> None:
    text = drawn(*(replace(FIGURES, model=f"model-{number}") for number in range(12)))
    assert len(text.splitlines()) <= 24
    assert all(f"model-{number} " in text for number in range(12))
    assert "10/16" in text
    assert len(drawn(FIGURES, replace(FIGURES, model="other")).splitlines()) <= 24


def test_what_is_not_known_is_not_invented() -> None:
    nothing = Latency(p50_s=None, p99_s=None)
    text = drawn(replace(FIGURES, kv_usage_ratio=None, first_token=nothing, generation_tokens_per_s=None))
    assert "5.12K tokens" in text
    assert "first token – / –" in text
    assert "no models" in drawn(problem="the metrics port does not answer")
    assert "does not answer" in drawn(problem="the metrics port does not answer")


def test_bars_are_never_longer_than_full_and_show_the_least() -> None:
    assert bar(0.0, 4).plain == "░░░░"
    assert bar(0.5, 4).plain == "██░░"
    assert bar(0.01, 4).plain == "█░░░"
    assert bar(7.0, 4).plain == "████"


def test_sparklines_scale_to_their_greatest_value() -> None:
    assert sparkline((0.0, 1.0, 4.0, 8.0)) == "▁▂▅█"
    assert sparkline((0.0, 0.0)) == "▁▁"
    assert sparkline(map(float, range(100)), 3) == "███"
    assert sparkline(()) == ""


@pytest.mark.parametrize(("seconds", "words"), [(None, "–"), (2e-4, "200 µs"), (0.0123, "12.3 ms"), (2.5, "2.5 s")])
def test_latencies_in_words(seconds: float | None, words: str) -> None:
    assert in_time(seconds) == words


def test_the_metrics_port_follows_from_the_address() -> None:
    assert metrics_address("gpu-box:50051") == "gpu-box:51051"
    assert metrics_address("[::1]:50051") == "[::1]:51051"
    for address in ("unix:socket", "host:65000", "host"):
        with pytest.raises(MetricsUnavailable):
            metrics_address(address)
    with pytest.raises(MetricsUnavailable, match="does not answer"):
        read_metrics("127.0.0.1:1", ClientSettings.resolve(environ={}), timeout_s=2)
