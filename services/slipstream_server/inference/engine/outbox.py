"""Events on their way out, and the running totals that Stats reports. Torch-free; engine thread."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Protocol

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.generation import Event, Failed, Stats

_STATS_INTERVAL_S = 0.25


class HoldsKV(Protocol):
    """Something whose keys and values are counted."""

    @property
    def kv_tokens(self) -> int: ...


@dataclass(slots=True)
class Totals:
    """Counts since the engine began. ``rows`` sums the rows of all steps."""

    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


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
        self._events.append(Failed(request_id, error.reason, error.message))

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def report(self, running: Sized, waiting: Sized, batch: HoldsKV | None, adapters: tuple[str, ...] = ()) -> None:
        """Add Stats where they have changed: at once when the engine falls idle, else every 250 ms at most."""
        totals = self.totals
        stats = Stats(
            num_running=len(running),
            num_waiting=len(waiting),
            kv_tokens=batch.kv_tokens if batch is not None and len(running) else 0,
            steps_total=totals.steps,
            prompt_tokens_total=totals.prompt_tokens,
            generation_tokens_total=totals.generation_tokens,
            batch_rows_total=totals.rows,
            adapters=adapters,
        )
        now = self._clock()
        is_idle = not len(running) and not len(waiting)
        if stats != self._reported and (is_idle or now - self._reported_s >= _STATS_INTERVAL_S):
            self._reported, self._reported_s = stats, now
            self._events.append(stats)
