"""What a caller asks of the front: a generation before tokenizing and before the model's defaults are filled in.

``rpc/`` builds these from protobuf, the front turns them into ``generation.GenerationRequest``. ``None`` always means
"not set by the caller". Field names in errors follow the protobuf spelling (``sampling.top_p``). No protobuf, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from slipstream_server.inference.generation import Constraint


class Priority(IntEnum):
    """Which queue a request waits in; lower runs first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a chat prompt, in the words of chat templates. ``role``: system, user, assistant or tool."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """Plain text, tokenized as the model's tokenizer does it."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """Token ids, taken as they are; each must lie in the model's vocabulary."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages, rendered by the model's own template."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_parameters: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingChoice:
    """``sampling`` of a request."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingChoice:
    """``stopping`` of a request."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseChoice:
    """``response`` of a request."""

    num_return_sequences: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    skip_special_tokens: bool = True
    include_stop: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamChoice:
    """``num_beams`` and ``beam`` of a request."""

    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One Generate or StreamGenerate as the caller meant it.

    ``model`` empty: the service's default. ``adapter``: ``name``, ``name@alias`` or ``name@v3``; empty for the model's
    default. ``deadline_monotonic_s``: on ``time.monotonic``'s clock, ``None`` for no deadline.
    ``forced_first_token_id``: what the answer of an encoder-decoder begins with; a translation's language.
    """

    prompt: Prompt
    model: str = ""
    adapter: str = ""
    sampling: SamplingChoice = SamplingChoice()
    stopping: StoppingChoice = StoppingChoice()
    response: ResponseChoice = ResponseChoice()
    beams: BeamChoice = BeamChoice()
    priority: Priority = Priority.NORMAL
    deadline_monotonic_s: float | None = None
    constraint: Constraint | None = None
    forced_first_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token with its natural-log probability under the model's own distribution (before penalties and filters)."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """One position: the token that stands there and the most likely ones, best first."""

    chosen: TokenLogprob | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedEvent:
    """First, once: which model and adapter version answer. ``adapter_version`` empty for the base."""

    model: str
    adapter_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaEvent:
    """New text and tokens of one sequence. Concatenated, the texts of an index are its completion."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: str | None = None
    matched_stop: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """Last, once: usage, and how each sequence ended (index -> finish reason, and the stop string or "")."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    finish_reasons: tuple[str, ...]
    matched_stops: tuple[str, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


GenerateEvent = StartedEvent | DeltaEvent | FinishedEvent
