"""Every metric that is promised is on the metrics port, counters go on over restarts, and labels stay bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from slipstream_server.inference.adapter_metrics import OTHER, AdapterLabels, AdaptersInUse
from slipstream_server.inference.generation import Stats
from slipstream_server.inference.metrics import InferenceMetrics, ModelMetrics
from slipstream_server.rpc.telemetry import RpcMetrics, new_registry

DASHBOARDS = Path(__file__).parents[3] / "deploy" / "dashboards"
PROMISED = {
    "slipstream_num_requests_running": "gauge",
    "slipstream_num_requests_waiting": "gauge",
    "slipstream_kv_cache_usage_ratio": "gauge",
    "slipstream_prefix_cache_queries": "counter",
    "slipstream_prefix_cache_hits": "counter",
    "slipstream_prompt_tokens": "counter",
    "slipstream_generation_tokens": "counter",
    "slipstream_request_success": "counter",
    "slipstream_time_to_first_token_seconds": "histogram",
    "slipstream_inter_token_latency_seconds": "histogram",
    "slipstream_e2e_request_latency_seconds": "histogram",
    "slipstream_request_queue_time_seconds": "histogram",
    "slipstream_num_preemptions": "counter",
    "slipstream_lora_requests_info": "gauge",
    "slipstream_task_latency_seconds": "histogram",
    "slipstream_task_inputs": "counter",
    "gen_ai_server_request_duration_seconds": "histogram",
    "gen_ai_server_time_to_first_token_seconds": "histogram",
    "gen_ai_server_time_per_output_token_seconds": "histogram",
    "rpc_server_call_duration_seconds": "histogram",
}


def stats(**totals: int) -> Stats:
    zero = dict.fromkeys(
        ("num_running", "num_waiting", "kv_tokens", "steps_total", "prompt_tokens_total", "generation_tokens_total",
         "batch_rows_total"), 0
    )  # fmt: skip
    return Stats(**{**zero, **totals})


class Metrics:
    """One model's metrics and what a scrape says of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.front = InferenceMetrics(registry)
        self.model: ModelMetrics = self.front.of_model("m", max_batch_size=4)
        in_use = AdaptersInUse(running=frozenset({"tone", "legal"}), waiting=frozenset({"support"}))
        self.model.watch(running=lambda: 2, waiting=lambda: 1, adapter_slots=8, adapters=lambda: in_use)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model": "m", **labels})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def exported() -> dict[str, str]:
    """What a served model's port names: family -> type."""
    registry = new_registry()
    RpcMetrics(registry)
    Metrics(registry)
    return {family.name: family.type for family in text_string_to_metric_families(generate_latest(registry).decode())}


def test_every_promised_metric_is_exported_with_its_type() -> None:
    found = exported()
    assert {name: found.get(name) for name in PROMISED} == PROMISED


def test_counters_go_on_when_a_new_worker_counts_from_zero(metrics: Metrics) -> None:
    metrics.model.engine(stats(steps_total=5, prefix_queries_total=100, prefix_hits_total=40, preemptions_total=1))
    metrics.model.engine(stats(steps_total=7, prefix_queries_total=110, prefix_hits_total=40, preemptions_total=1))
    metrics.model.worker_died()
    # More than the old one had: a new worker's total is not the growth of the old one's.
    metrics.model.engine(
        stats(steps_total=9, prefix_queries_total=3, draft_tokens_total=8, accepted_draft_tokens_total=6)
    )
    assert metrics.value("slipstream_engine_steps_total") == 7 + 9
    assert metrics.value("slipstream_prefix_cache_queries_total") == 110 + 3
    assert metrics.value("slipstream_prefix_cache_hits_total") == 40
    assert metrics.value("slipstream_num_preemptions_total") == 1
    assert metrics.value("slipstream_spec_decode_num_draft_tokens_total") == 8
    assert metrics.value("slipstream_spec_decode_num_accepted_tokens_total") == 6
    assert metrics.value("slipstream_worker_restarts_total") == 1


def test_kv_usage_is_of_the_capacity_and_nothing_once_the_worker_is_gone(metrics: Metrics) -> None:
    metrics.model.engine(stats(kv_tokens=96, kv_capacity_tokens=128))
    assert metrics.value("slipstream_kv_cache_usage_ratio") == 0.75
    metrics.model.worker_died()
    assert metrics.value("slipstream_kv_cache_usage_ratio") == 0
    metrics.model.engine(stats(kv_tokens=96))  # an engine without a fixed capacity
    assert metrics.value("slipstream_kv_cache_usage_ratio") == 0
    assert metrics.value("slipstream_kv_cache_tokens") == 96


def test_lora_requests_info_is_as_the_gateway_reads_it(metrics: Metrics) -> None:
    text = generate_latest(metrics.registry).decode()
    family = next(f for f in text_string_to_metric_families(text) if f.name == "slipstream_lora_requests_info")
    (sample,) = family.samples
    assert sample.labels == {
        "model": "m", "running_lora_adapters": "legal,tone", "waiting_lora_adapters": "support", "max_lora": "8",
    }  # fmt: skip
    assert sample.value > 1.7e9  # seconds of the epoch: the gateway takes the latest
    metrics.front.unloaded("m")
    assert "lora_requests_info{" not in generate_latest(metrics.registry).decode()


def test_of_a_deleted_model_no_series_is_left(metrics: Metrics) -> None:
    def use(model: ModelMetrics) -> None:
        model.engine(stats(steps_total=5, kv_tokens=96, kv_capacity_tokens=128))
        model.worker_died()
        for adapter in ("", "adapters/support/versions/v3"):
            request = model.of_request(adapter, operation="chat", arrival_s=0.0)
            request.joined(0.01, 30)
            request.first_token(0.5)
            request.next_tokens(4, 0.1)
            request.generated(5)
            request.succeeded(("eos_token",), 2.5)
            request.failed("INTERNAL")
        for is_generated in (False, True):
            model.of_task("fill-mask", is_generated=is_generated).answered(0.1, "INVALID_FIELD")

    def series() -> int:
        return sum(len(family.samples) for family in metrics.registry.collect())

    use(metrics.model)
    before = series()
    for number in range(3):
        another = metrics.front.of_model(f"m{number}", max_batch_size=4)
        another.watch(running=lambda: 0, waiting=lambda: 0)
        use(another)
        assert series() > before
        metrics.front.unloaded(f"m{number}")
        assert metrics.registry.get_sample_value("slipstream_engine_steps_total", {"model": f"m{number}"}) == 5
        metrics.front.forget(f"m{number}")
        assert series() == before
    assert metrics.value("slipstream_engine_steps_total") == 5


def test_tokens_and_requests_are_told_by_adapter(metrics: Metrics) -> None:
    request = metrics.model.of_request("adapters/support/versions/v3", operation="chat", arrival_s=0.0)
    request.joined(0.01, 30)
    request.first_token(0.5)
    request.generated(5)
    request.succeeded(("eos_token",), 2.5)
    assert metrics.value("slipstream_prompt_tokens_total", adapter="support") == 30
    assert metrics.value("slipstream_generation_tokens_total", adapter="support") == 5
    assert metrics.value("slipstream_request_success_total", adapter="support", finish_reason="eos_token") == 1
    assert metrics.value("slipstream_prompt_tokens_total", adapter="") is None
    labels = {
        "gen_ai_operation_name": "chat", "gen_ai_provider_name": "slipstream", "gen_ai_request_model": "m",
    }  # fmt: skip
    name = "gen_ai_server_time_per_output_token_seconds_sum"
    assert metrics.registry.get_sample_value(name, labels) == (2.5 - 0.5) / 4
    name = "gen_ai_server_request_duration_seconds_sum"
    assert metrics.registry.get_sample_value(name, {**labels, "error_type": ""}) == 2.5


def test_a_failed_request_has_its_reason(metrics: Metrics) -> None:
    metrics.model.of_request("", operation="text_completion", arrival_s=0.0).failed("OUT_OF_MEMORY")
    assert metrics.value("slipstream_request_failure_total", adapter="", reason="OUT_OF_MEMORY") == 1
    text = generate_latest(metrics.registry).decode()
    assert re.search(r'gen_ai_server_request_duration_seconds_count\{error_type="OUT_OF_MEMORY",[^}]*\} 1\.0', text)


def test_ever_new_adapters_do_not_make_ever_new_series() -> None:
    labels = AdapterLabels(max_adapters=3)
    found = {labels.of_version(f"adapters/a{number}/versions/v1") for number in range(50)}
    assert found == {"a0", "a1", "a2", OTHER}
    assert labels.of_version("adapters/a1/versions/v7") == "a1"
    assert labels.of_version("") == ""


@pytest.mark.parametrize("file", ["slipstream.json", "alerts.yaml"])
def test_dashboard_and_alerts_ask_for_metrics_that_exist(file: str) -> None:
    text = (DASHBOARDS / file).read_text()
    asked = set(re.findall(r"\b(?:slipstream|gen_ai|rpc_server)_[a-z0-9_]+", text))
    families = exported()
    series = {
        f"{family}{suffix}"
        for family, kind in families.items()
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(kind, ("",))
    }
    assert len(asked) > 5
    assert asked <= series, asked - series


def test_the_dashboard_is_json_with_one_query_a_panel_at_least() -> None:
    dashboard = json.loads((DASHBOARDS / "slipstream.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
