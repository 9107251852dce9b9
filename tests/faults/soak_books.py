"""The books of a soak: what the service counted against what its clients saw.

    finished   requests whose whole answer a client has read, sequence by sequence
    left       requests that had begun to answer when their clients left them
    unclear    calls whose clients left without knowing whether the service had taken them. They ask for an adapter of
               their own (HASTY), so that the books of everybody else agree to the request

A request that ended twice, or never, is on one side only. Plain values: knows nothing of calls and channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

HASTY = "hasty"
"""The adapter of those who leave at once."""
LEAVING = {"CANCELLED", "DEADLINE_EXCEEDED"}
"""Reasons for which a request may fail: its client's."""
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_SERVICE = "slipstream.inference.v1.InferenceService"


@dataclass(slots=True)
class Seen:
    """What clients saw. ``sequences`` by (adapter, finish reason), ``left`` by adapter; ``refused`` counts calls."""

    finished: int = 0
    sequences: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    unclear: int = 0
    refused: int = 0
    task_calls: int = 0
    task_inputs: int = 0

    def answered(self, adapter: str, finish_reasons: Iterable[str]) -> None:
        """A request's answer is there, all its sequences with it."""
        self.finished += 1
        self.sequences.update((adapter, reason) for reason in finish_reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the service counted. ``calls`` and ``task_calls`` have a status; ``joined`` requests have been in a batch.

    ``sequences`` ended well, by (adapter, finish reason); ``failures`` are requests, by (adapter, reason).
    """

    calls: int
    joined: int
    finished: int
    sequences: Counter[tuple[str, ...]]
    failures: Counter[tuple[str, ...]]
    task_calls: int
    task_inputs: int

    @classmethod
    def of(cls, metrics: Mapping[str, float], *, generator: str, judge: str) -> Self:
        """From a scrape, by name with labels, for the model that generates and the one that does tasks."""
        calls = _totals(metrics, "rpc_server_call_duration_seconds_count", "rpc_method")
        about = {"model": generator}
        return cls(
            calls=calls[(f"{_SERVICE}/Generate",)] + calls[(f"{_SERVICE}/StreamGenerate",)],
            joined=_totals(metrics, "slipstream_request_queue_time_seconds_count", **about).total(),
            finished=_totals(metrics, "slipstream_e2e_request_latency_seconds_count", **about).total(),
            sequences=_totals(metrics, "slipstream_request_success_total", "adapter", "finish_reason", **about),
            failures=_totals(metrics, "slipstream_request_failure_total", "adapter", "reason", **about),
            task_calls=calls[(f"{_SERVICE}/RunTask",)],
            task_inputs=_totals(metrics, "slipstream_task_inputs_total", model=judge, reason="").total(),
        )

    def failed(self, adapter: str) -> int:
        """Requests for an adapter that failed, whatever for."""
        return sum(count for (asked, _), count in self.failures.items() if asked == adapter)


def disagreements(seen: Seen, counted: Counted) -> list[str]:
    """Every way in which the two do not fit together; none where each request has ended exactly once."""
    return [*_of_answers(seen, counted), *_of_those_left(seen, counted), *_of_the_hasty(seen, counted)]


def _of_answers(seen: Seen, counted: Counted) -> Iterator[str]:
    for adapter, reason in sorted({*seen.sequences, *counted.sequences}):
        there, here = counted.sequences[adapter, reason], seen.sequences[adapter, reason]
        if there != here:
            yield f"{reason} ended {there} sequences of adapter {adapter!r} at the service, {here} at its clients"
    for what in ("finished", "task_calls", "task_inputs"):
        if getattr(counted, what) != getattr(seen, what):
            yield f"{what}: {getattr(counted, what)} at the service, {getattr(seen, what)} at its clients"


def _of_those_left(seen: Seen, counted: Counted) -> Iterator[str]:
    for adapter in sorted({*seen.left, *(adapter for adapter, _ in counted.failures)} - {HASTY}):
        if counted.failed(adapter) != seen.left[adapter]:
            yield (
                f"{counted.failed(adapter)} requests of adapter {adapter!r} failed at the service, "
                f"clients left {seen.left[adapter]}"
            )
    for (adapter, reason), count in sorted(counted.failures.items()):
        if count and reason not in LEAVING:
            yield f"{count} requests of adapter {adapter!r} failed by {reason}"


def _of_the_hasty(seen: Seen, counted: Counted) -> Iterator[str]:
    """They are whatever the others are not: as many as began have ended, and no more than came."""
    known = seen.finished + seen.left.total()
    joined, ended, came = counted.joined - known, counted.failed(HASTY), counted.calls - known - seen.refused
    if not 0 <= joined <= ended:
        yield f"{joined} requests of the hasty joined a batch, {ended} ended"
    if not ended <= came <= seen.unclear:
        yield f"{seen.unclear} calls of the hasty were made, {came} came, {ended} requests of them ended"


def _totals(metrics: Mapping[str, float], name: str, *labels: str, **where: str) -> Counter[tuple[str, ...]]:
    """Values of one metric by some of its labels, of those that have these others."""
    totals: Counter[tuple[str, ...]] = Counter()
    for key, value in metrics.items():
        own, _, rest = key.partition("{")
        found = dict(_LABEL.findall(rest))
        if own == name and where.items() <= found.items():
            totals[tuple(found[label] for label in labels)] += int(value)
    return totals
