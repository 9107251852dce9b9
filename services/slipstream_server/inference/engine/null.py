"""An engine that does nothing: every token is the same and there at once. It measures what everything around an
engine costs. Torch-free.
"""

from __future__ import annotations

import time
from collections import deque

from slipstream_server.inference.engine.outbox import Gauges, Outbox
from slipstream_server.inference.generation import (
    Admitted,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Ready,
    Tokens,
)

NULL_TOKEN_ID = 1


class NullEngine:
    """Answers each request, whatever it asks for, with ``max_new_tokens`` times the same token: one token per request
    and step.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[GenerationRequest, int]] = {}
        self._new: deque[int] = deque()
        self._outbox = Outbox(time.monotonic)

    def submit(self, request: GenerationRequest) -> None:
        self._left[request.id] = (request, max(1, request.stopping.max_new_tokens))
        self._new.append(request.id)
        self._outbox.totals.prompt_tokens += len(request.prompt_token_ids)

    def cancel(self, request_id: int) -> None:
        self._left.pop(request_id, None)

    def end_sequence(self, request_id: int, index: int) -> None:
        """One sequence's stop ends all: they are equal."""
        if self._left.pop(request_id, None) is not None:
            self._outbox.put(Finished(request_id))

    def wait_s(self) -> float | None:
        return 0.0 if self._left or self._outbox.has_events else None

    def step(self) -> list[Event]:
        while self._new:
            if (request_id := self._new.popleft()) in self._left:
                self._outbox.put(Admitted(request_id))
        for request_id in list(self._left):
            self._emit(request_id)
        self._outbox.totals.steps += 1
        self._outbox.report(Gauges(num_running=len(self._left)))
        return self._outbox.take()

    def _emit(self, request_id: int) -> None:
        request, left = self._left[request_id]
        reason: FinishReason | None = "length" if left == 1 else None
        for index in range(request.num_return_sequences):
            self._outbox.put(Tokens(request_id, index, [NULL_TOKEN_ID], None, reason))
        self._outbox.totals.generation_tokens += request.num_return_sequences
        if reason is not None:
            del self._left[request_id]
            self._outbox.put(Finished(request_id))
        else:
            self._left[request_id] = (request, left - 1)


def null_facts() -> Ready:
    """What a null worker says of itself."""
    return Ready(device="none", dtype="none", attention="none", batching="null", memory_bytes=0)
