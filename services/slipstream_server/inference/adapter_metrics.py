"""Adapters in the metrics: one label value each within bounds, and which of them have requests now.

``lora_requests_info`` has the form that the Gateway API inference extension reads: a gauge whose labels
``running_lora_adapters`` and ``waiting_lora_adapters`` list adapters with commas between, ``max_lora`` their room, and
whose value is the time it was true.
Source: https://gateway-api-inference-extension.sigs.k8s.io (model server protocol).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

MAX_ADAPTERS = 100
OTHER = "_OTHER"


class AdapterLabels:
    """Label values of one model's adapters: their ids, and ``OTHER`` for those after the first ``max_adapters``."""

    def __init__(self, max_adapters: int = MAX_ADAPTERS) -> None:
        self._max_adapters = max_adapters
        self._known = {""}

    def of_version(self, version: str) -> str:
        """The label for ``adapters/{adapter}/versions/{version}``; empty for the base model."""
        adapter = adapter_id(version)
        if adapter not in self._known:
            if len(self._known) > self._max_adapters:
                return OTHER
            self._known.add(adapter)
        return adapter


@dataclass(frozen=True, slots=True)
class AdaptersInUse:
    """Ids of adapters with requests in a batch, and of those with requests that wait."""

    running: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()


class LoraRequestsInfo(Collector):
    """``slipstream_lora_requests_info``, one sample for each model that can hold adapters."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[int, Callable[[], AdaptersInUse]]] = {}

    def watch(self, model: str, adapter_slots: int, in_use: Callable[[], AdaptersInUse]) -> None:
        self._models[model] = (adapter_slots, in_use)

    def forget(self, model: str) -> None:
        self._models.pop(model, None)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [self._family()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = self._family()
        for model, (adapter_slots, in_use) in list(self._models.items()):
            now = in_use()
            family.add_metric([model, _listed(now.running), _listed(now.waiting), str(adapter_slots)], time.time())
        yield family

    def _family(self) -> GaugeMetricFamily:
        labels = ["model", "running_lora_adapters", "waiting_lora_adapters", "max_lora"]
        return GaugeMetricFamily(
            "slipstream_lora_requests_info", "Adapters with requests, and room for them.", labels=labels
        )


def adapter_id(version: str) -> str:
    """The adapter of ``adapters/{adapter}/versions/{version}``."""
    parts = version.split("/")
    return parts[1] if len(parts) == 4 else version


def _listed(adapters: frozenset[str]) -> str:
    return ",".join(sorted(adapters)[:MAX_ADAPTERS])
