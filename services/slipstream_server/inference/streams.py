"""A generation as its reader sees it: started, deltas, finished, each in its place and the end exactly once.

The worker's events come in as they happen; the reader takes them when it can. In between stands one pending delta for
each sequence, into which further ones merge while the reader lags, so that what is buffered is bounded by the answer
itself. Whoever stops reading (``aclose``, a cancelled ``__anext__``, the end of ``async with``) frees the worker's row
at once; a reader that does not come back for longer than the front allows is cut off (SlowReader).

One stream has one reader. Event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

from slipstream_server.errors import InternalError, SlipstreamError, SlowReader
from slipstream_server.inference.calls import (
    DeltaEvent,
    FinishedEvent,
    GenerateEvent,
    PositionLogprobs,
    ResponseChoice,
    StartedEvent,
)
from slipstream_server.inference.completion import SequenceText, position_logprobs
from slipstream_server.inference.detokenizer import DetokenizerFactory
from slipstream_server.inference.dispatcher import Ticket
from slipstream_server.inference.generation import Admitted, GenerationRequest, PromptLogprobs, Tokens
from slipstream_server.inference.stop_strings import StopAutomaton


class StreamObserver(Protocol):
    """Who measures; times are monotonic seconds."""

    def joined(self, seconds: float, prompt_tokens: int) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def next_tokens(self, count: int, seconds: float) -> None: ...
    def succeeded(self, finish_reasons: tuple[str, ...], seconds: float) -> None: ...
    def failed(self, reason: str) -> None: ...
    def generated(self, count: int) -> None: ...


@dataclass(slots=True)
class _PendingDelta:
    """Text and tokens of one sequence that wait for the reader."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: str = ""

    def event(self, index: int) -> DeltaEvent:
        return DeltaEvent(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
        )


@dataclass(slots=True)
class _Sequence:
    text: SequenceText
    num_tokens: int = 0
    last_token_s: float | None = None


class GenerationStream:
    """The events of one request: an async iterator, to be used with ``async with`` or closed in ``finally``."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        started: StartedEvent,
        response: ResponseChoice,
        stop: tuple[str, ...],
        echo_text: str,
        detokenizers: DetokenizerFactory,
        observer: StreamObserver,
        on_leave: Callable[[GenerationStream], None],
    ) -> None:
        self.ticket = Ticket(request=request, sink=self)
        self.model = started.model
        self._started = started
        self._echo_text = echo_text
        self._detokenizers = detokenizers
        self._observer = observer
        self._on_leave = on_leave
        automaton = StopAutomaton(stop) if stop else None
        self._sequences = [
            _Sequence(
                SequenceText(
                    detokenizers.new(skip_special_tokens=response.skip_special_tokens),
                    automaton,
                    include_stop=response.include_stop,
                )
            )
            for _ in range(request.num_return_sequences)
        ]
        self._cached_prompt_tokens = 0
        self._prompt_positions: PromptLogprobs | None = None
        self._has_started = False
        self._pending_start: StartedEvent | None = None
        self._pending: dict[int, _PendingDelta] = {}
        self._outcome: FinishedEvent | SlipstreamError | None = None
        self._is_over = False
        self._has_left = False
        self._wake = asyncio.Event()
        self._unread_since_s: float | None = None

    # The reader's side.

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerateEvent:
        """The next event; raises the request's failure after the events that came before it.

        Cancelling it closes the stream.
        """
        while not self._is_over:
            event = self._take()
            if isinstance(event, FinishedEvent) and self._prompt_positions is not None:
                # There may be many of them, which others need not wait for.
                return await asyncio.to_thread(self._with_prompt, event, self._prompt_positions)
            if event is not None:
                return event
            self._wake.clear()
            try:
                await self._wake.wait()
            except asyncio.CancelledError:
                self.close()
                raise
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """The same as ``close``, for those who hold it as an async iterator."""
        self.close()

    def close(self) -> None:
        """The reader wants no more: frees the worker's row, if it still has one. Any number of times."""
        if not self.is_ended:
            self._observer.failed("CANCELLED")
        self._is_over = True
        self._pending.clear()
        self._wake.set()
        self._leave()

    def _take(self) -> GenerateEvent | None:
        self._unread_since_s = None
        if (started := self._pending_start) is not None:
            self._pending_start = None
            return started
        if self._pending:
            index = next(iter(self._pending))
            return self._pending.pop(index).event(index)
        if self._outcome is None:
            return None
        self._is_over = True
        self._leave()
        if isinstance(self._outcome, SlipstreamError):
            raise self._outcome
        return self._outcome

    def _with_prompt(self, event: FinishedEvent, found: PromptLogprobs) -> FinishedEvent:
        pairs = zip(self.ticket.request.prompt_token_ids, found.positions, strict=True)
        return replace(event, prompt_logprobs=tuple(position_logprobs(*pair, self._detokenizers) for pair in pairs))

    def _leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            self._on_leave(self)

    # The worker's side: a RequestSink.

    def admitted(self, event: Admitted) -> None:
        if self._has_started:
            return
        self._has_started = True
        self._cached_prompt_tokens = event.cached_prompt_tokens
        queued_s = time.monotonic() - self.ticket.arrival_s
        self._observer.joined(queued_s, len(self.ticket.request.prompt_token_ids))
        self._pending_start = self._started
        if self._echo_text:
            for index in range(len(self._sequences)):
                self._pending[index] = _PendingDelta(texts=[self._echo_text])
        self._notify()

    def tokens(self, event: Tokens) -> bool:
        sequence = self._sequences[event.index]
        if self._is_over or sequence.text.finish_reason is not None:
            return False
        if not self._has_started:
            self.admitted(Admitted(event.id))
        piece = sequence.text.push(event.token_ids, event.finish_reason)
        self._measure(sequence, piece.num_tokens)
        logprobs = zip(event.token_ids[: piece.num_tokens], event.logprobs or (), strict=False)
        pending = self._pending.setdefault(event.index, _PendingDelta())
        pending.texts.append(piece.text)
        pending.token_ids += event.token_ids[: piece.num_tokens]
        pending.logprobs += [position_logprobs(token, found, self._detokenizers) for token, found in logprobs]
        pending.finish_reason = piece.finish_reason
        pending.matched_stop = piece.matched_stop
        self._notify()
        return piece.finish_reason == "stop_string" and event.finish_reason is None

    def prompt_logprobs(self, event: PromptLogprobs) -> None:
        self._prompt_positions = event

    def finished(self) -> None:
        reasons = tuple(sequence.text.finish_reason or "" for sequence in self._sequences)
        if not all(reasons):
            raise RuntimeError("the worker finished a request whose sequences have not all ended")
        self._end(
            FinishedEvent(
                prompt_tokens=len(self.ticket.request.prompt_token_ids),
                completion_tokens=sum(sequence.num_tokens for sequence in self._sequences),
                cached_prompt_tokens=self._cached_prompt_tokens,
                finish_reasons=reasons,
                matched_stops=tuple(sequence.text.matched_stop for sequence in self._sequences),
            )
        )
        self._observer.succeeded(reasons, time.monotonic() - self.ticket.arrival_s)

    def fail(self, error: SlipstreamError) -> None:
        if self._outcome is None and not self._is_over:
            self._end(error)
            self._observer.failed(error.reason)

    def _end(self, outcome: FinishedEvent | SlipstreamError) -> None:
        if self._outcome is not None:
            raise InternalError("a request ended twice")
        self._outcome = outcome
        self._notify()

    def _measure(self, sequence: _Sequence, count: int) -> None:
        now_s = time.monotonic()
        sequence.num_tokens += count
        self._observer.generated(count)
        if sequence.last_token_s is not None:
            self._observer.next_tokens(count, now_s - sequence.last_token_s)
        elif all(other.last_token_s is None for other in self._sequences):
            self._observer.first_token(now_s - self.ticket.arrival_s)
        sequence.last_token_s = now_s

    def _notify(self) -> None:
        if self._unread_since_s is None:
            self._unread_since_s = time.monotonic()
        self._wake.set()

    # The front's side.

    @property
    def is_ended(self) -> bool:
        """Whether the outcome stands, read or not."""
        return self._outcome is not None or self._is_over

    def unread_s(self) -> float:
        """For how long something has been waiting for the reader."""
        return 0.0 if self._unread_since_s is None else time.monotonic() - self._unread_since_s

    def cut_off(self) -> None:
        """The reader has not come back for too long: free everything; should it come yet, it gets SlowReader."""
        self._pending.clear()
        self._pending_start = None
        if self._outcome is None:
            self.fail(SlowReader("the stream was not read for longer than the write timeout"))
        self._leave()
