"""The queue before a model's worker: bounded, by priority, fair to the patient.

The next ticket is the oldest of the highest priority, where every ``ageing_s`` of waiting lifts one by a priority:
after at most twice that, LOW stands level with HIGH and wins by age, so that it never starves.
Requests and prompt tokens are bounded; over the bound a request is refused with an estimate of when to come back.

Plain synchronous code on the event loop; it owns no task and reads no clock but the one it is given.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from slipstream_server.errors import QueueFull
from slipstream_server.inference.calls import Priority

_MIN_RETRY_S, _MAX_RETRY_S = 0.5, 60.0
_RATE_WEIGHT = 0.1


class Waiting(Protocol):
    """What the queue needs to know of a request. ``arrival_s`` is monotonic; ``is_search``: it may have to wait for
    others of its kind while those behind it need not.
    """

    @property
    def id(self) -> int: ...
    @property
    def priority(self) -> Priority: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def is_search(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds of one model's queue."""

    max_requests: int = 1024
    max_prompt_tokens: int = 4 * 1024 * 1024
    ageing_s: float = 10.0


W = TypeVar("W", bound=Waiting)


class AdmissionQueue(Generic[W]):
    """Requests that wait for the worker."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._queues: dict[tuple[Priority, bool], OrderedDict[int, W]] = {
            (priority, is_search): OrderedDict() for priority in Priority for is_search in (False, True)
        }
        self._front = OrderedDict[int, W]()
        self.num_reserved = 0
        self.num_prompt_tokens = 0
        self._seconds_per_request = 0.0
        self._last_taken_s: float | None = None

    def __len__(self) -> int:
        return len(self._front) + sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[W]:
        # Copies: the metrics are read on another thread while the loop goes on.
        yield from list(self._front.values())
        for queue in self._queues.values():
            yield from list(queue.values())

    def reserve(self) -> None:
        """Hold a place while a prompt is tokenized; raises QueueFull.

        ``release`` gives it back, also before ``put``.
        """
        if len(self) + self.num_reserved >= self._limits.max_requests:
            raise self._full(f"{self._limits.max_requests} requests wait for the model, as many as may")
        self.num_reserved += 1

    def release(self) -> None:
        self.num_reserved -= 1

    def put(self, waiting: W) -> None:
        """Queue a request; raises QueueFull."""
        if len(self) + self.num_reserved >= self._limits.max_requests:
            raise self._full(f"{self._limits.max_requests} requests wait for the model, as many as may")
        if len(self) and self.num_prompt_tokens + waiting.num_prompt_tokens > self._limits.max_prompt_tokens:
            raise self._full(f"the waiting prompts have {self.num_prompt_tokens} tokens")
        self._queues[waiting.priority, waiting.is_search][waiting.id] = waiting
        self.num_prompt_tokens += waiting.num_prompt_tokens

    def put_back(self, waiting: W) -> None:
        """Queue a request before all others, bounds aside: it had been admitted once."""
        self._front[waiting.id] = waiting
        self._front.move_to_end(waiting.id, last=False)
        self.num_prompt_tokens += waiting.num_prompt_tokens

    def peek(self, *, searches: bool = True) -> W | None:
        """The request whose turn it is; ``searches``: a search may be it."""
        for waiting in self._front.values():
            if searches or not waiting.is_search:
                return waiting
        now_s = self._clock()
        queues = [queue for (_, is_search), queue in self._queues.items() if queue and (searches or not is_search)]
        heads = [next(iter(queue.values())) for queue in queues]
        return min(heads, key=lambda head: self._rank(head, now_s), default=None)

    def take(self, waiting: W) -> None:
        """Remove a request that goes to the worker."""
        self.remove(waiting)
        now_s = self._clock()
        if self._last_taken_s is not None:
            sample = now_s - self._last_taken_s
            self._seconds_per_request += _RATE_WEIGHT * (min(sample, _MAX_RETRY_S) - self._seconds_per_request)
        self._last_taken_s = now_s if len(self) else None

    def remove(self, waiting: W) -> bool:
        """Remove a request that is not wanted any more; False where it is not here."""
        for queue in (self._front, self._queues[waiting.priority, waiting.is_search]):
            if queue.pop(waiting.id, None) is not None:
                self.num_prompt_tokens -= waiting.num_prompt_tokens
                return True
        return False

    def _rank(self, waiting: W, now_s: float) -> tuple[int, float]:
        lifted = int((now_s - waiting.arrival_s) / self._limits.ageing_s)
        return max(int(waiting.priority) - lifted, 0), waiting.arrival_s

    def _full(self, message: str) -> QueueFull:
        estimate_s = self._seconds_per_request * len(self) / 2
        return QueueFull(message, retry_after_s=min(max(estimate_s, _MIN_RETRY_S), _MAX_RETRY_S))
