"""What a service tells on its Prometheus port: read with the client's token and TLS, and parsed.

Blocks; call it on a thread. Not known here: what the numbers mean.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from slipstream_client.errors import InvalidRequestError
from slipstream_client.settings import ClientSettings

PORT_OFFSET = 1000
MAX_BYTES = 16 * 1024 * 1024


class MetricsUnavailable(Exception):
    """The port does not answer, or not with metrics."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One number; counters end in ``_total``, histograms in ``_bucket``, ``_count`` and ``_sum``."""

    name: str
    labels: Mapping[str, str]
    value: float


Samples = tuple[Sample, ...]


def metrics_address(address: str) -> str:
    """The metrics port of the service at ``address``, where nobody has moved it. Raises MetricsUnavailable."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) + PORT_OFFSET > 65_535:
        raise MetricsUnavailable(f"{address} has no port that the metrics port could follow from")
    return f"{host}:{int(port) + PORT_OFFSET}"


def read_metrics(address: str, settings: ClientSettings, *, timeout_s: float) -> Samples:
    """The samples at the metrics port ``address``. Raises MetricsUnavailable."""
    host, _, port = address.rpartition(":")
    try:
        connection = _connection(host.strip("[]"), int(port), settings, timeout_s)
        try:
            connection.request("GET", "/metrics", headers=_headers(settings))
            answer = connection.getresponse()
            text = answer.read(MAX_BYTES).decode()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise MetricsUnavailable(f"the metrics port does not answer at {address}") from error
    if answer.status != http.HTTPStatus.OK:
        raise MetricsUnavailable(f"the metrics port at {address} answers {answer.status} {answer.reason}")
    try:
        return tuple(_parse(text))
    except ValueError as error:
        raise MetricsUnavailable(f"what answers at {address} speaks no Prometheus text") from error


def total(samples: Samples, name: str, **labels: str) -> float | None:
    """The sum of the samples of that name with those labels; None where there are none."""
    found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    return sum(found) if found else None


def _parse(text: str) -> Iterator[Sample]:
    # Here, because every other verb does without it.
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield Sample(sample.name, sample.labels, sample.value)


def _headers(settings: ClientSettings) -> dict[str, str]:
    return {"Authorization": f"Bearer {settings.token}"} if settings.token else {}


def _connection(host: str, port: int, settings: ClientSettings, timeout_s: float) -> http.client.HTTPConnection:
    if not settings.tls:
        return http.client.HTTPConnection(host, port, timeout=timeout_s)
    context = ssl.create_default_context(cafile=settings.ca_cert)
    if settings.client_cert is not None:
        if settings.client_key is None:
            raise InvalidRequestError.of("client_key", "a client certificate needs its key")
        context.load_cert_chain(settings.client_cert, settings.client_key)
    return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
