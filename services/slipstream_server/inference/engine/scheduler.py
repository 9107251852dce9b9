"""Who runs next: requests wait here until a batch of those that may share a call is full, or has waited long enough.

Plain Python without torch, on the engine's thread; time is an argument, in seconds of ``time.monotonic``.

The size of a batch is what its padded tensors can grow to. ``tokens`` = rows x (longest prompt + most new tokens),
where every returned sequence and every beam is a row: the left-padded prompts and all that may be generated after
them lie in one rectangle. A request that exceeds a bound all by itself runs alone rather than never.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from slipstream_server.inference.generation import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """When a batch is full, and how long one that is not may wait for company."""

    max_batch_size: int = 16
    max_batch_tokens: int = 16384
    max_queue_delay_ms: float = 5.0
    max_batch_adapters: int = 8

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_batch_size", self.max_batch_size, 1),
            ("max_batch_tokens", self.max_batch_tokens, 1),
            ("max_queue_delay_ms", self.max_queue_delay_ms, 0),
            ("max_batch_adapters", self.max_batch_adapters, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name} is {value}; at least {least}")


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: GenerationRequest
    arrival: int
    since_s: float
    key: Hashable

    @property
    def rank(self) -> tuple[int, int]:
        return (self.request.priority, self.arrival)


@dataclass(slots=True)
class _Rectangle:
    """The padded size of a batch in the making, and the digests of the adapters in it."""

    rows: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    adapters: frozenset[str] = frozenset()

    def grown(self, request: GenerationRequest) -> _Rectangle:
        return _Rectangle(
            self.rows + num_rows(request),
            max(self.prompt_tokens, len(request.prompt_token_ids)),
            max(self.new_tokens, request.stopping.max_new_tokens),
            self.adapters if request.adapter is None else self.adapters | {request.adapter.digest},
        )

    def fits(self, limits: BatchLimits) -> bool:
        tokens = self.rows * (self.prompt_tokens + self.new_tokens)
        return (
            self.rows <= limits.max_batch_size
            and tokens <= limits.max_batch_tokens
            and len(self.adapters) <= limits.max_batch_adapters
        )

    def is_full(self, limits: BatchLimits) -> bool:
        return self.rows >= limits.max_batch_size


def num_rows(request: GenerationRequest) -> int:
    """Rows of a batch that the request takes."""
    return max(request.num_return_sequences, request.beams.num_beams)


class Scheduler:
    """The waiting requests, ordered by priority, then arrival.

    ``share_key`` names the group of a request: only requests of one group share a batch.
    """

    def __init__(self, limits: BatchLimits, share_key: Callable[[GenerationRequest], Hashable]) -> None:
        self._limits = limits
        self._share_key = share_key
        self._waiting: dict[int, _Waiting] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def add(self, request: GenerationRequest, now_s: float) -> None:
        """Let ``request`` wait; its id must not wait already."""
        if request.id in self._waiting:
            raise ValueError(f"request {request.id} waits already")
        self._waiting[request.id] = _Waiting(request, self._arrivals, now_s, self._share_key(request))
        self._arrivals += 1

    def remove(self, request_id: int) -> bool:
        """Forget a request; whether it waited."""
        return self._waiting.pop(request_id, None) is not None

    def take_expired(self, now_s: float) -> list[GenerationRequest]:
        """Requests whose deadline has passed; they wait no more."""
        expired = [w.request for w in self._waiting.values() if has_expired(w.request, now_s)]
        for request in expired:
            del self._waiting[request.id]
        return expired

    def collect(self, now_s: float) -> list[GenerationRequest]:
        """The next batch, best first; empty where it pays to wait a little longer.

        The first in order is always of the party, so that nobody is overtaken for ever; one that does not fit is
        passed over.
        """
        chosen, is_full = self._best_batch()
        if not chosen or not (is_full or self._has_waited(chosen, now_s)):
            return []
        for waiting in chosen:
            del self._waiting[waiting.request.id]
        return [waiting.request for waiting in chosen]

    def due_s(self) -> float | None:
        """When ``collect`` would return something at the latest; None while nobody waits."""
        oldest = min((w.since_s for w in self._waiting.values()), default=None)
        return None if oldest is None else oldest + self._limits.max_queue_delay_ms / 1000

    def next_deadline_s(self) -> float | None:
        """The earliest deadline of those who wait."""
        deadlines = (w.request.deadline_monotonic_s for w in self._waiting.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _best_batch(self) -> tuple[list[_Waiting], bool]:
        """The best batch now, and whether waiting cannot make it larger (somebody had to be left out, or no row is
        left).
        """
        ranked = sorted(self._waiting.values(), key=lambda waiting: waiting.rank)
        chosen: list[_Waiting] = []
        shape = _Rectangle()
        left_out = False
        for waiting in ranked:
            if chosen and waiting.key != chosen[0].key:
                continue
            grown = shape.grown(waiting.request)
            if chosen and not grown.fits(self._limits):
                left_out = True
                continue
            chosen.append(waiting)
            shape = grown
            if shape.is_full(self._limits):
                break
        return chosen, left_out or shape.is_full(self._limits) or not shape.fits(self._limits)

    def _has_waited(self, chosen: list[_Waiting], now_s: float) -> bool:
        """Whether anyone has waited long enough; those of other groups count, since they wait for this batch to
        start.
        """
        due = self.due_s()
        return due is not None and now_s >= due


def has_expired(request: GenerationRequest, now_s: float) -> bool:
    """Whether the request's deadline has passed."""
    return request.deadline_monotonic_s is not None and now_s >= request.deadline_monotonic_s
