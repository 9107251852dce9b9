"""Events on their way out, and the running totals that Stats reports. Torch-free; engine thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.generation import Event, Failed, Stats

_STATS_INTERVAL_S = 0.25


@dataclass(slots=True)
class Totals:
    """Counts since the engine began. ``rows`` sums the rows of all steps."""

    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """How the engine stands at the end of a step; names and meanings as in Stats."""

    num_running: int = 0
    num_waiting: int = 0
    kv_tokens: int = 0
    kv_capacity_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    adapters: tuple[str, ...] = ()


class Outbox:
    """The events of the step that runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.totals = Totals()
        self._clock = clock
        self._events: list[Event] = []
        self._reported: Stats | None = None
        self._reported_s = -_STATS_INTERVAL_S

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def put(self, event: Event) -> None:
        self._events.append(event)

    def fail(self, request_id: int, error: SlipstreamError) -> None:
        """The request's terminal event is this error."""
        self._events.append(Failed(request_id, error.reason, error.message, error.field, error.metadata))

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def report(self, gauges: Gauges) -> None:
        """Add Stats where they have changed: at once when the engine falls idle, else every 250 ms at most."""
        totals = self.totals
        stats = Stats(
            num_running=gauges.num_running,
            num_waiting=gauges.num_waiting,
            kv_tokens=gauges.kv_tokens,
            steps_total=totals.steps,
            prompt_tokens_total=totals.prompt_tokens,
            generation_tokens_total=totals.generation_tokens,
            batch_rows_total=totals.rows,
            kv_capacity_tokens=gauges.kv_capacity_tokens,
            prefix_queries_total=gauges.prefix_queries,
            prefix_hits_total=gauges.prefix_hits,
            preemptions_total=gauges.preemptions,
            draft_tokens_total=totals.draft_tokens,
            accepted_draft_tokens_total=totals.accepted_draft_tokens,
            adapters=gauges.adapters,
        )
        now = self._clock()
        is_idle = not gauges.num_running and not gauges.num_waiting
        if stats != self._reported and (is_idle or now - self._reported_s >= _STATS_INTERVAL_S):
            self._reported, self._reported_s = stats, now
            self._events.append(stats)
