"""OpenTelemetry's metrics of generative models, in Prometheus spelling as ``rpc.server.call.duration`` is.

    gen_ai.server.request.duration        every request that was admitted; error.type where it failed
    gen_ai.server.time_to_first_token     requests that succeeded
    gen_ai.server.time_per_output_token   requests that succeeded with more than one token

Names, attributes and buckets: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/. Where the ``otel``
extra is installed the same measurements also go to OpenTelemetry's own meter, which does nothing until it is set up.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from slipstream_server.otel import duration_histogram

PROVIDER = "slipstream"
_DURATION_BUCKETS_S = tuple(0.01 * 2**power for power in range(14))
_FIRST_TOKEN_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_PER_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class GenAiMetrics:
    """The collectors of one front."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.duration = _Instrument(
            registry, "request.duration", "From arrival to the last token.", _DURATION_BUCKETS_S, "error_type"
        )
        self.first_token = _Instrument(
            registry, "time_to_first_token", "From arrival to the first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self.per_output_token = _Instrument(
            registry, "time_per_output_token", "Mean time of the tokens after a request's first.", _PER_TOKEN_BUCKETS_S
        )

    def of(self, model: str, operation: str) -> OperationMetrics:
        return OperationMetrics(self, model, operation)

    def forget(self, model: str) -> None:
        for instrument in (self.duration, self.first_token, self.per_output_token):
            instrument.forget(model)


class OperationMetrics:
    """Measurements of one kind of operation on one model."""

    def __init__(self, of: GenAiMetrics, model: str, operation: str) -> None:
        self._of = of
        self._labels = (operation, PROVIDER, model)

    def ended(self, seconds: float, *, error_type: str = "") -> None:
        self._of.duration.record(seconds, *self._labels, error_type)

    def first_token(self, seconds: float) -> None:
        self._of.first_token.record(seconds, *self._labels)

    def per_output_token(self, seconds: float) -> None:
        self._of.per_output_token.record(seconds, *self._labels)


class _Instrument:
    """One histogram, told to Prometheus and, where it is installed, to OpenTelemetry."""

    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, buckets_s: tuple[float, ...], *more_labels: str
    ) -> None:
        self._labels = (*_LABELS, *more_labels)
        spelt = f"gen_ai_server_{name.replace('.', '_')}_seconds"
        self._prometheus = Histogram(spelt, text, self._labels, registry=registry, buckets=buckets_s)
        self._otel = duration_histogram(f"gen_ai.server.{name}", text, buckets_s)
        self._attributes = tuple(map(_attribute, self._labels))

    def record(self, seconds: float, *values: str) -> None:
        self._prometheus.labels(*values).observe(seconds)
        if self._otel is not None:
            self._otel.record(
                seconds, {key: value for key, value in zip(self._attributes, values, strict=True) if value}
            )

    def forget(self, model: str) -> None:
        """OpenTelemetry's own meter has no way to drop a series."""
        self._prometheus.remove_by_labels({"gen_ai_request_model": model})


def _attribute(label: str) -> str:
    """``gen_ai_operation_name`` is ``gen_ai.operation.name``."""
    return "gen_ai." + label.removeprefix("gen_ai_").replace("_", ".") if label != "error_type" else "error.type"
