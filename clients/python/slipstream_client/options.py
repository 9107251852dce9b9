"""The keyword arguments of the calls, under the contract's own names.

None, like leaving it out, means: the server's own default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from slipstream_client.results import ChatMessage, Tool

PriorityName = Literal["low", "normal", "high"]


class CallOptions(TypedDict, total=False):
    """How a call is made. ``request_id`` goes out as x-request-id (default: a new one) and comes back on errors."""

    timeout_s: float | None
    request_id: str | None


class SamplingOptions(TypedDict, total=False):
    """``slipstream.type.v1.SamplingOptions``: ranges and defaults stand there."""

    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    seed: int | None
    logit_bias: Mapping[int, float] | None


class StoppingOptions(TypedDict, total=False):
    """``slipstream.type.v1.StoppingOptions``."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None


class ResponseOptions(TypedDict, total=False):
    """``slipstream.type.v1.ResponseOptions``, but for ``logprobs``, which chat knows too."""

    num_return_sequences: int | None
    prompt_logprobs: int | None
    echo: bool | None
    skip_special_tokens: bool | None
    include_stop: bool | None


class BeamOptions(TypedDict, total=False):
    """``slipstream.type.v1.BeamOptions``."""

    length_penalty: float | None
    early_stopping: bool | None


class ConstraintOptions(TypedDict, total=False):
    """``slipstream.type.v1.Constraint``: at most one of them. ``json_schema`` as JSON text or as a mapping."""

    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None


class TemplateOptions(TypedDict, total=False):
    """What the chat template is given beside the messages."""

    tools: Sequence[Tool] | None
    template_parameters: Mapping[str, Any] | None


class AnswerOptions(CallOptions, SamplingOptions, StoppingOptions, ConstraintOptions, TemplateOptions, total=False):
    """What generation and chat have in common."""

    model: str | None
    adapter: str | None
    priority: PriorityName | None
    logprobs: int | None


class GenerateOptions(AnswerOptions, ResponseOptions, BeamOptions, total=False):
    """Keyword arguments of ``generate`` and ``stream_generate``.

    TemplateOptions and ``continue_final_message`` only with messages.
    """

    num_beams: int | None
    add_special_tokens: bool | None
    continue_final_message: bool | None


class CompleteOptions(AnswerOptions, total=False):
    """Keyword arguments of ``complete`` and ``stream_complete``."""


class CountOptions(CallOptions, TemplateOptions, total=False):
    """Keyword arguments of ``count_tokens``."""

    model: str | None
    add_special_tokens: bool | None
    continue_final_message: bool | None


Message = ChatMessage | Mapping[str, Any]
"""A message: a ChatMessage, or a mapping with its fields, as ``{"role": "user", "content": "Hello"}``."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or messages for the model's chat template."""
