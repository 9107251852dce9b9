"""A whole generation at once, for callers who do not stream. Event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from slipstream_server.errors import InternalError
from slipstream_server.inference.calls import DeltaEvent, FinishedEvent, GenerateEvent, PositionLogprobs, StartedEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: str
    matched_stop: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A finished request: completions by index."""

    model: str
    adapter_version: str
    completions: tuple[Completion, ...]
    usage: FinishedEvent


@dataclass(slots=True)
class _Parts:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    matched_stop: str = ""

    def add(self, delta: DeltaEvent) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.matched_stop = delta.matched_stop or self.matched_stop

    def completion(self, index: int) -> Completion:
        return Completion(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
        )


async def collect(events: AsyncIterator[GenerateEvent]) -> GenerationResult:
    """Read a stream to its end. The caller closes it; failures pass through."""
    started = StartedEvent(model="")
    parts: dict[int, _Parts] = {}
    async for event in events:
        match event:
            case StartedEvent():
                started = event
            case DeltaEvent():
                parts.setdefault(event.index, _Parts()).add(event)
            case FinishedEvent():
                return GenerationResult(
                    model=started.model,
                    adapter_version=started.adapter_version,
                    completions=tuple(parts[index].completion(index) for index in sorted(parts)),
                    usage=event,
                )
    raise InternalError("a stream ended without its last event")
