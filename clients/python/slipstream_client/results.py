"""What calls return: small frozen dataclasses without protobuf, ready for ``dataclasses.asdict``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why a sequence ended; ``slipstream.type.v1.FinishReason`` without its prefix.

    UNSPECIFIED also stands for values newer than this client.
    """

    UNSPECIFIED = "unspecified"
    EOS_TOKEN = "eos_token"  # noqa: S105 - of the model
    STOP_TOKEN = "stop_token"  # noqa: S105 - of the model
    STOP_STRING = "stop_string"
    LENGTH = "length"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request cost, in tokens of the model that answered."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """The token at one position, and the likeliest ones there, best first."""

    chosen: TokenLogprob | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One completed sequence."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = FinishReason.UNSPECIFIED
    matched_stop: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A completed prompt. ``text``, ``token_ids`` and ``finish_reason`` are those of the first sequence."""

    completions: tuple[Completion, ...]
    usage: Usage = Usage()
    model: str = ""
    adapter_version: str = ""
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def text(self) -> str:
        return self.completions[0].text if self.completions else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids if self.completions else ()

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason if self.completions else FinishReason.UNSPECIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDelta:
    """New text of one sequence; ``finish_reason`` is set on the last delta of an index."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason = FinishReason.UNSPECIFIED
    matched_stop: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentPart:
    """One part of a message that is more than one text: exactly one of the three is set."""

    text: str | None = None
    image: bytes | None = None
    audio: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool by the model."""

    id: str = ""
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool offered to the model. ``parameters``: the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message; ``role`` is system, user, assistant or tool. Both what is sent and what comes back."""

    role: str
    content: str = ""
    parts: tuple[ContentPart, ...] = ()
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletion:
    """The answer to a list of messages."""

    message: ChatMessage
    finish_reason: FinishReason = FinishReason.UNSPECIFIED
    usage: Usage = Usage()
    model: str = ""
    adapter_version: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def text(self) -> str:
        return self.message.content


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """New text of an answer."""

    text: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token; ``start`` and ``end`` count code points of the text, and are equal for special tokens that were
    added.
    """

    id: int
    token: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """The tokens of a text."""

    tokens: tuple[Token, ...]
    model: str = ""

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detokenization:
    """The text of some token ids."""

    text: str
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """How large a prompt is, and how much the model can take."""

    prompt_tokens: int
    context_tokens: int
    model: str = ""


class HealthState(StrEnum):
    """How a service is: what it says of itself, or UNREACHABLE where nobody answers."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceHealth:
    """The health of one service. ``latency_ms`` of the check; None where there was no answer; ``problem`` says why."""

    service: str
    address: str
    state: HealthState
    latency_ms: float | None = None
    problem: str = ""
