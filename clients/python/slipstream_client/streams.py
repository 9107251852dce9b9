"""Answers while they come: asynchronous iterators of deltas which know, once they have ended, how the call went.

Leaving the loop early cancels the call on the server. A stream belongs to the event loop of its client and is
iterated once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream_client import convert, results
from slipstream_client.errors import ProtocolError
from slipstream_client.results import ChatDelta, FinishReason, GenerationDelta, Usage

Delta = TypeVar("Delta")


@dataclass(slots=True)
class Outcome:
    """How a streamed call went so far."""

    request_id: str
    model: str = ""
    adapter_version: str = ""
    usage: Usage = field(default_factory=Usage)
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    matched_stops: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: tuple[results.PositionLogprobs, ...] = ()
    texts: dict[int, str] = field(default_factory=dict)
    finished: bool = False


class AnswerStream(Generic[Delta]):
    """Deltas as they come, then ``usage`` and ``finish_reason``.

    ``model`` and ``adapter_version`` are known from the first delta on; ``texts`` holds, by index, what has come so
    far. ``async with`` closes it however the block is left; so does the end of an ``async for``, by whatever way.
    """

    def __init__(self, deltas: AsyncGenerator[Delta], outcome: Outcome) -> None:
        # The generator must not know this object: a cycle would keep an abandoned call alive until the next garbage
        # collection.
        self._deltas = deltas
        self._outcome = outcome

    def __aiter__(self) -> AsyncIterator[Delta]:
        # A generator of its own, which only the loop holds: leaving the loop ends it at once, though the stream
        # itself lives on.
        return _closing(self._deltas)

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the call, on the server too, if it has not ended."""
        await self._deltas.aclose()

    async def read_all(self) -> str:
        """Wait for the end; the whole text of the first sequence."""
        async for _ in self:
            pass
        return self.text

    @property
    def text(self) -> str:
        """The text of the first sequence, as far as it has come."""
        return self._outcome.texts.get(0, "")

    @property
    def texts(self) -> dict[int, str]:
        """The text of every sequence by its index, as far as it has come."""
        return dict(self._outcome.texts)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self._outcome.finished

    @property
    def model(self) -> str:
        return self._outcome.model

    @property
    def adapter_version(self) -> str:
        return self._outcome.adapter_version

    @property
    def usage(self) -> Usage:
        """What the call cost; zeros before the end."""
        return self._outcome.usage

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sequence ended; UNSPECIFIED before its end."""
        return self._outcome.finish_reasons.get(0, FinishReason.UNSPECIFIED)

    @property
    def finish_reasons(self) -> dict[int, FinishReason]:
        return dict(self._outcome.finish_reasons)

    @property
    def matched_stops(self) -> dict[int, str]:
        """The stop string that ended a sequence, by its index."""
        return dict(self._outcome.matched_stops)

    @property
    def prompt_logprobs(self) -> tuple[results.PositionLogprobs, ...]:
        return self._outcome.prompt_logprobs

    @property
    def request_id(self) -> str:
        return self._outcome.request_id


async def _closing(deltas: AsyncGenerator[Delta]) -> AsyncGenerator[Delta]:
    try:
        async for delta in deltas:
            yield delta
    finally:
        await deltas.aclose()


def generation_stream(
    events: AsyncGenerator[inference_pb2.StreamGenerateResponse], request_id: str
) -> AnswerStream[GenerationDelta]:
    """The deltas of ``StreamGenerate``."""
    outcome = Outcome(request_id)
    return AnswerStream(_generation_deltas(events, outcome), outcome)


async def _generation_deltas(
    events: AsyncGenerator[inference_pb2.StreamGenerateResponse], outcome: Outcome
) -> AsyncGenerator[GenerationDelta]:
    try:
        async for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                outcome.model, outcome.adapter_version = event.started.model, event.started.adapter_version
            elif kind == "delta":
                delta = convert.generation_delta(event.delta)
                outcome.texts[delta.index] = outcome.texts.get(delta.index, "") + delta.text
                yield delta
            elif kind == "finished":
                _note_finished_generation(event.finished, outcome)
        check_finished(outcome)
    finally:
        await events.aclose()


def _note_finished_generation(finished: inference_pb2.GenerationFinished, outcome: Outcome) -> None:
    outcome.usage = convert.usage(finished.usage)
    outcome.prompt_logprobs = convert.logprobs(finished.prompt_logprobs)
    for completion in finished.completions:
        outcome.finish_reasons[completion.index] = convert.finish_reason(completion.finish_reason)
        if completion.matched_stop:
            outcome.matched_stops[completion.index] = completion.matched_stop
    outcome.finished = True


def chat_stream(events: AsyncGenerator[chat_pb2.StreamCompleteResponse], request_id: str) -> AnswerStream[ChatDelta]:
    """The deltas of ``StreamComplete``."""
    outcome = Outcome(request_id)
    return AnswerStream(_chat_deltas(events, outcome), outcome)


async def _chat_deltas(
    events: AsyncGenerator[chat_pb2.StreamCompleteResponse], outcome: Outcome
) -> AsyncGenerator[ChatDelta]:
    try:
        async for event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                outcome.model, outcome.adapter_version = event.started.model, event.started.adapter_version
            elif kind == "delta":
                delta = convert.chat_delta(event.delta)
                outcome.texts[0] = outcome.texts.get(0, "") + delta.text
                yield delta
            elif kind == "finished":
                outcome.usage = convert.usage(event.finished.usage)
                outcome.finish_reasons[0] = convert.finish_reason(event.finished.finish_reason)
                outcome.finished = True
        check_finished(outcome)
    finally:
        await events.aclose()


def check_finished(outcome: Outcome) -> None:
    """Raise unless the last event has come."""
    if not outcome.finished:
        raise ProtocolError(
            "the stream ended without its last event: the answer may be cut short", request_id=outcome.request_id
        )
