"""Which workloads there are by name, at how many requests at a time, and what is compared on each. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.engine import workloads
from tests.bench.engine.workloads import Workload

POISSON_PERCENTS = (50, 80, 95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One workload at one concurrency. ``make`` takes the offset; ``measures`` are what is compared.

    ``has_arrivals``: not for sides that know none.
    """

    name: str
    make: Callable[[int], Workload]
    measures: Sequence[str]
    has_arrivals: bool = False


def closed_plan(corpus: Sequence[int], num_requests: int) -> Plan:
    """The closed workload."""
    return Plan(
        name=f"closed_{num_requests}",
        make=lambda offset: workloads.closed(corpus, num_requests, offset),
        measures=("output_tokens_per_s",),
    )


def plans(names: Sequence[str], corpus: Sequence[int], num_requests: int, peer_requests_per_s: float) -> list[Plan]:
    """The plans of the named workloads; ``peer_requests_per_s`` is the peer's capacity, for those that arrive."""
    found: list[Plan] = []
    for name in names:
        found += _PLANS[name](corpus, num_requests, peer_requests_per_s)
    return found


def _closed(corpus: Sequence[int], num_requests: int, _capacity: float) -> list[Plan]:
    return [closed_plan(corpus, num_requests)]


def _poisson(corpus: Sequence[int], num_requests: int, capacity: float) -> list[Plan]:
    def plan(percent: int) -> Plan:
        return Plan(
            name=f"poisson_{percent}",
            make=lambda offset: workloads.poisson(corpus, num_requests, percent, capacity, offset),
            measures=("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"),
            has_arrivals=True,
        )

    return [plan(percent) for percent in POISSON_PERCENTS]


def _shared_prefix(corpus: Sequence[int], _num_requests: int, _capacity: float) -> list[Plan]:
    return [
        Plan(
            name=f"shared_prefix_{workloads.SHARED_PREFIX_TOKENS}",
            make=lambda offset: workloads.shared_prefix(corpus, offset=offset),
            measures=("output_tokens_per_s",),
        )
    ]


def _long_beside_short(corpus: Sequence[int], _num_requests: int, _capacity: float) -> list[Plan]:
    return [
        Plan(
            name="long_beside_short",
            make=lambda offset: workloads.long_beside_short(corpus, offset=offset),
            measures=("output_tokens_per_s", "short_itl_p99_ms", "long_ttft_p50_ms"),
            has_arrivals=True,
        )
    ]


_PLANS = {
    "closed": _closed,
    "poisson": _poisson,
    "shared_prefix": _shared_prefix,
    "long_beside_short": _long_beside_short,
}
WORKLOADS = tuple(_PLANS)
