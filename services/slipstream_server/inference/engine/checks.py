"""Whether a model can run a request at all. The front has validated before; the engine must not trust it with a
shared batch. Torch-free.
"""

from __future__ import annotations

import math

from slipstream_server.errors import InvalidField, PromptTooLong, SlipstreamError, UnsupportedField
from slipstream_server.inference.engine.beam_rules import unsupported_with_beams
from slipstream_server.inference.generation import GenerationRequest, Sampling

MAX_LOGPROBS = 1000
MAX_PROMPT_LOGPROBS = 131_072
"""Entries of all positions together."""


def refusal(
    request: GenerationRequest, *, vocab_size: int, context_tokens: int | None, is_encoder_decoder: bool
) -> SlipstreamError | None:
    """Why the request cannot run, or None. ``context_tokens`` bounds prompt and answer together; each alone in an
    encoder-decoder.
    """
    for check in (_bad_prompt(request, vocab_size), _bad_sampling(request.sampling, vocab_size), _bad_counts(request)):
        if check is not None:
            return InvalidField.of(*check)
    for field, why in unsupported_with_beams(request):
        return UnsupportedField.of(field, why)
    if is_encoder_decoder and request.prompt_logprobs is not None:
        return UnsupportedField.of("response.prompt_logprobs", "an encoder-decoder model has none")
    return _too_long(request, context_tokens, is_encoder_decoder)


def _bad_prompt(request: GenerationRequest, vocab_size: int) -> tuple[str, str] | None:
    if not request.prompt_token_ids:
        return "prompt", "is empty; at least one token is needed"
    for token_id in request.prompt_token_ids:
        if not 0 <= token_id < vocab_size:
            return "prompt.token_ids", f"{token_id} is no token; ids lie in 0..{vocab_size - 1}"
    return None


def _bad_sampling(sampling: Sampling, vocab_size: int) -> tuple[str, str] | None:
    ranges = (
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_k", sampling.top_k, 0, math.inf),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("typical_p", sampling.typical_p, 0.0, 1.0),
        ("presence_penalty", sampling.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf),
        ("no_repeat_ngram_size", sampling.no_repeat_ngram_size, 0, math.inf),
    )
    for name, value, least, most in ranges:
        if not (least <= value <= most and math.isfinite(value)):
            return f"sampling.{name}", f"{value} is not allowed; a finite number from {least:g} to {most:g}"
    if not 0.0 < sampling.repetition_penalty < math.inf:
        return "sampling.repetition_penalty", f"{sampling.repetition_penalty} is not allowed; a finite number above 0"
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            return "sampling.logit_bias", f"{token_id} is no token; ids lie in 0..{vocab_size - 1}"
        if math.isnan(bias) or bias == math.inf:
            return "sampling.logit_bias", f"{bias} is not allowed; a number below infinity"
    return None


def _bad_counts(request: GenerationRequest) -> tuple[str, str] | None:
    counts = (
        ("stopping.max_new_tokens", request.stopping.max_new_tokens, 1),
        ("stopping.min_new_tokens", request.stopping.min_new_tokens, 0),
        ("response.num_return_sequences", request.num_return_sequences, 1),
        ("response.logprobs", request.logprobs or 0, 0),
        ("response.prompt_logprobs", request.prompt_logprobs or 0, 0),
        ("num_beams", request.beams.num_beams, 1),
    )
    for name, value, least in counts:
        if value < least:
            return name, f"{value} is not allowed; at least {least}"
    return _bad_logprobs(request)


def _bad_logprobs(request: GenerationRequest) -> tuple[str, str] | None:
    """Alternatives without bound would keep the front from everything else while it writes them out."""
    if (request.logprobs or 0) > MAX_LOGPROBS:
        return "response.logprobs", f"{request.logprobs} is not allowed; at most {MAX_LOGPROBS}"
    entries = len(request.prompt_token_ids) * (request.prompt_logprobs or 0)
    if entries > MAX_PROMPT_LOGPROBS:
        return "response.prompt_logprobs", (
            f"{request.prompt_logprobs} for {len(request.prompt_token_ids)} tokens are {entries} entries; "
            f"at most {MAX_PROMPT_LOGPROBS}"
        )
    return None


def _too_long(
    request: GenerationRequest, context_tokens: int | None, is_encoder_decoder: bool
) -> SlipstreamError | None:
    if context_tokens is None or is_encoder_decoder:
        return None
    prompt, new = len(request.prompt_token_ids), request.stopping.max_new_tokens
    if prompt + new > context_tokens:
        return PromptTooLong.of("prompt", f"{prompt} tokens and {new} new ones exceed the context of {context_tokens}")
    return None
