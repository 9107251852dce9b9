"""OpenTelemetry's metrics, pushed to a collector: only where the ``otel`` extra is installed and an endpoint is set.

The endpoint and all else come from OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_METRIC_EXPORT_INTERVAL, ...). The exporter has a thread of its own. Without extra or endpoint every call here does
nothing; Prometheus has the same numbers in any case.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")


def export_metrics(service: str, environ: Mapping[str, str] = os.environ) -> Callable[[], None]:
    """Begin to push the metrics of this process; the answer sends what is left, and ends it."""
    if not any(environ.get(name) for name in _ENDPOINTS) or environ.get("OTEL_METRICS_EXPORTER", "otlp") != "otlp":
        return _nothing
    try:
        from opentelemetry import metrics
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
    except ImportError:
        logger.warning("an OpenTelemetry endpoint is set, but its packages are missing: pip install 'slipstream[otel]'")
        return _nothing
    resource = Resource.create({"service.name": environ.get("OTEL_SERVICE_NAME") or f"slipstream-{service}"})
    provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], resource=resource)
    metrics.set_meter_provider(provider)
    return provider.shutdown


def duration_histogram(name: str, text: str, buckets_s: tuple[float, ...]) -> Any:
    """An OpenTelemetry histogram in seconds; None where there is no OpenTelemetry."""
    try:
        from opentelemetry import metrics
    except ImportError:
        return None
    meter = metrics.get_meter("slipstream")
    return meter.create_histogram(name, unit="s", description=text, explicit_bucket_boundaries_advisory=buckets_s)


def _nothing() -> None:
    pass
