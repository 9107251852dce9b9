"""OpenTelemetry's metrics arrive at a collector, and nothing happens without one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from slipstream_server.otel import export_metrics

PROGRAM = """
import grpc
from prometheus_client import CollectorRegistry
from slipstream_server.inference.metrics import InferenceMetrics
from slipstream_server.otel import export_metrics
from slipstream_server.rpc.telemetry import RpcMetrics

end = export_metrics("inference")
rpc, front = RpcMetrics(CollectorRegistry()), InferenceMetrics(CollectorRegistry())
rpc.started("/a.B/C")
rpc.finished("/a.B/C", grpc.StatusCode.NOT_FOUND, 0.25)
request = front.of_model("m", max_batch_size=4).of_request("", operation="chat", arrival_s=0.0)
request.first_token(0.5)
request.generated(3)
request.succeeded(("length",), 1.5)
end()
"""


class Collector(BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]] = []

    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_zipped = self.headers.get("Content-Encoding") == "gzip"
        self.received.append((self.path, gzip.decompress(body) if is_zipped else body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_collector_gets_names_attributes_and_sums(endpoint: str) -> None:
    collector = pytest.importorskip("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")
    env = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "no_proxy": "127.0.0.1"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, timeout=60)
    (path, body) = Collector.received[-1]
    assert path == "/v1/metrics"
    (resource,) = collector.ExportMetricsServiceRequest.FromString(body).resource_metrics
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "slipstream-inference"
    points = {
        metric.name: (point.sum, {a.key: a.value.string_value for a in point.attributes})
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.histogram.data_points
    }
    gen_ai = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "slipstream", "gen_ai.request.model": "m"}
    assert points == {
        "gen_ai.server.request.duration": (1.5, gen_ai),
        "gen_ai.server.time_to_first_token": (0.5, gen_ai),
        "gen_ai.server.time_per_output_token": (0.5, gen_ai),
        "rpc.server.call.duration": (
            0.25,
            {
                "rpc.system.name": "grpc",
                "rpc.method": "a.B/C",
                "rpc.response.status_code": "NOT_FOUND",
                "error.type": "NOT_FOUND",
            },
        ),
    }


def test_without_an_endpoint_nothing_is_set_up() -> None:
    export_metrics("inference", {})()
    export_metrics("inference", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_METRICS_EXPORTER": "none"})()
