"""From what a caller asks to what the worker does: every field checked, every default filled in, nothing dropped.

Unset fields take the model's own generation_config, then the contract's defaults. Sampling is off unless the request or
the generation_config switches it on. A request that sets a field which only sampling can honour (a temperature above 0,
top_k, top_p, min_p, typical_p; neutral values and the seed aside) while sampling is off is an InvalidField that says
so: transformers would ignore such a field with a warning, OpenAI would sample, and either guess would surprise
somebody. Temperature 0 means greedy whatever do_sample says.

Pure functions; any thread. Field names in errors are those of the protobuf contract.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from slipstream_server.errors import FieldViolation, InvalidField, PromptTooLong, UnsupportedField
from slipstream_server.inference.calls import (
    BeamChoice,
    ChatPrompt,
    GenerateCall,
    Prompt,
    ResponseChoice,
    SamplingChoice,
    StoppingChoice,
    TextPrompt,
    TokenPrompt,
)
from slipstream_server.inference.constraint_rules import check_constraint
from slipstream_server.inference.engine.beam_rules import unsupported_with_beams
from slipstream_server.inference.generation import AdapterPin, Beams, GenerationRequest, Sampling, Stopping
from slipstream_server.inference.stop_strings import check_stop_strings
from slipstream_server.models.facts import Family, GenerationDefaults, ModelFacts

DEFAULT_MAX_NEW_TOKENS = 512
MAX_SEQUENCES = 16
MAX_BEAMS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_NGRAM = 1024
UNBOUNDED_CONTEXT_TOKENS = 131_072
"""Stands in for the context of models that have no bound of their own (relative positions)."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed numbers; ``above`` excludes the lower end. Whole bounds are shown with all their digits."""

    low: float
    high: float
    above: bool = False

    def check(self, field: str, value: float) -> None:
        fits = math.isfinite(value) and value <= self.high and (value > self.low if self.above else value >= self.low)
        if not fits:
            low, high = (f"{end}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
            ends = f"above {low} and at most {high}" if self.above else f"{low} to {high}"
            raise InvalidField.of(field, f"{value} is outside the allowed range, {ends}")


SAMPLING_RANGES = {
    "temperature": Range(0.0, 100.0),
    "top_k": Range(0, MAX_TOP_K),
    "top_p": Range(0.0, 1.0, above=True),
    "min_p": Range(0.0, 1.0),
    "typical_p": Range(0.0, 1.0, above=True),
    "repetition_penalty": Range(0.01, 10.0),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "no_repeat_ngram_size": Range(0, MAX_NGRAM),
    "seed": Range(0, MAX_SEED),
}
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
LENGTH_PENALTY_RANGE = Range(-10.0, 10.0)
LOGIT_BIAS_RANGE = Range(-100.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveLimits:
    """What bounds a request beside the model: the context the worker serves, its vocabulary."""

    context_tokens: int
    vocab_size: int

    @classmethod
    def of(cls, facts: ModelFacts, *, max_context_tokens: int | None = None) -> ResolveLimits:
        own = facts.context_tokens or UNBOUNDED_CONTEXT_TOKENS
        context = own if max_context_tokens is None else min(own, max_context_tokens)
        if facts.vocab_size is None:
            raise InvalidField.of("model", "its config.json names no vocab_size")
        return cls(context_tokens=context, vocab_size=facts.vocab_size)


def check_call(call: GenerateCall, limits: ResolveLimits) -> None:
    """Raise InvalidField for every field that can be judged before the prompt is tokenized."""
    _check_sampling(call.sampling, limits)
    _check_stopping(call.stopping, limits)
    _check_response(call.response)
    _check_beams(call.beams)
    if call.constraint is not None:
        check_constraint(call.constraint)


def resolve(
    call: GenerateCall,
    facts: ModelFacts,
    limits: ResolveLimits,
    *,
    request_id: int,
    prompt_token_ids: tuple[int, ...],
    adapter: AdapterPin | None = None,
    arrival_monotonic_s: float | None = None,
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED + 1),
) -> GenerationRequest:
    """The complete request. Raises InvalidField, UnsupportedField or PromptTooLong."""
    check_call(call, limits)
    beams = _beams(call.beams, facts.generation)
    sampling = _sampling(call.sampling, facts.generation, beams, draw_seed)
    request = GenerationRequest(
        id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        stopping=_stopping(call, facts, limits, len(prompt_token_ids)),
        beams=beams,
        num_return_sequences=_num_sequences(call.response, facts.generation, sampling, beams),
        logprobs=call.response.logprobs,
        prompt_logprobs=call.response.prompt_logprobs,
        priority=int(call.priority),
        deadline_monotonic_s=call.deadline_monotonic_s,
        arrival_monotonic_s=arrival_monotonic_s,
        adapter=adapter,
        constraint=call.constraint,
        forced_first_token_id=call.forced_first_token_id,
    )
    for field, why in unsupported_with_beams(request):
        raise UnsupportedField.of(field, why)
    if request.prompt_logprobs is not None and facts.family is Family.ENCODER_DECODER:
        raise UnsupportedField.of("response.prompt_logprobs", "an encoder-decoder model has none")
    return request


def _check_sampling(choice: SamplingChoice, limits: ResolveLimits) -> None:
    for name, allowed in SAMPLING_RANGES.items():
        value = getattr(choice, name)
        if value is not None:
            allowed.check(f"sampling.{name}", value)
    if len(choice.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidField.of("sampling.logit_bias", f"{len(choice.logit_bias)} entries; at most {MAX_LOGIT_BIAS}")
    for token_id, bias in choice.logit_bias.items():
        _check_token(token_id, limits, "sampling.logit_bias")
        LOGIT_BIAS_RANGE.check(f"sampling.logit_bias[{token_id}]", bias)


def _check_stopping(choice: StoppingChoice, limits: ResolveLimits) -> None:
    check_stop_strings(choice.stop)
    for place, stop in enumerate(choice.stop):
        if "\0" in stop or any("\ud800" <= char <= "\udfff" for char in stop):
            raise InvalidField.of(f"stopping.stop[{place}]", "holds NUL or a lone surrogate")
    if len(choice.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        found = len(choice.stop_token_ids)
        raise InvalidField.of("stopping.stop_token_ids", f"{found} ids; at most {MAX_STOP_TOKEN_IDS}")
    for token_id in choice.stop_token_ids:
        _check_token(token_id, limits, "stopping.stop_token_ids")
    if choice.max_new_tokens is not None:
        Range(1, limits.context_tokens).check("stopping.max_new_tokens", choice.max_new_tokens)
    if choice.min_new_tokens is not None:
        Range(0, limits.context_tokens).check("stopping.min_new_tokens", choice.min_new_tokens)


def _check_response(choice: ResponseChoice) -> None:
    for name, value, allowed in (
        ("num_return_sequences", choice.num_return_sequences, Range(1, MAX_SEQUENCES)),
        ("logprobs", choice.logprobs, Range(0, MAX_LOGPROBS)),
        ("prompt_logprobs", choice.prompt_logprobs, Range(0, MAX_LOGPROBS)),
    ):
        if value is not None:
            allowed.check(f"response.{name}", value)


def _check_beams(choice: BeamChoice) -> None:
    if choice.num_beams is not None:
        Range(1, MAX_BEAMS).check("num_beams", choice.num_beams)
    if choice.length_penalty is not None:
        LENGTH_PENALTY_RANGE.check("beam.length_penalty", choice.length_penalty)


def _check_token(token_id: int, limits: ResolveLimits, field: str) -> None:
    if not 0 <= token_id < limits.vocab_size:
        raise InvalidField.of(field, f"{token_id} is not in the vocabulary (0 to {limits.vocab_size - 1})")


def _sampling(
    choice: SamplingChoice, defaults: GenerationDefaults, beams: Beams, draw_seed: Callable[[], int]
) -> Sampling:
    on = _samples(choice, defaults, beams)
    seed = choice.seed if choice.seed is not None else draw_seed() if on else 0
    return Sampling(
        do_sample=on,
        temperature=_first(choice.temperature, defaults.temperature, 1.0) if on else 1.0,
        top_k=_first(choice.top_k, defaults.top_k, 0) if on else 0,
        top_p=_first(choice.top_p, defaults.top_p, 1.0) if on else 1.0,
        min_p=_first(choice.min_p, defaults.min_p, 0.0) if on else 0.0,
        typical_p=_first(choice.typical_p, _other_number(defaults, "typical_p"), 1.0) if on else 1.0,
        repetition_penalty=_first(choice.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(choice.presence_penalty, None, 0.0),
        frequency_penalty=_first(choice.frequency_penalty, None, 0.0),
        no_repeat_ngram_size=_first(choice.no_repeat_ngram_size, defaults.no_repeat_ngram_size, 0),
        seed=seed,
        logit_bias=dict(choice.logit_bias),
    )


def _samples(choice: SamplingChoice, defaults: GenerationDefaults, beams: Beams) -> bool:
    """Whether to sample; raises for fields that would then be without effect."""
    if choice.do_sample and beams.num_beams > 1:
        raise InvalidField.of("num_beams", f"{beams.num_beams} beams exclude sampling; unset sampling.do_sample")
    temperature = _first(choice.temperature, defaults.temperature, 1.0)
    asked = _first(choice.do_sample, defaults.do_sample, False)
    if asked and temperature > 0 and beams.num_beams == 1:
        return True
    for name, neutral in _NEUTRAL.items():
        value = getattr(choice, name)
        if value is not None and value != neutral and not (name == "temperature" and value == 0):
            raise InvalidField.of(f"sampling.{name}", f"{value} {_why_without_effect(choice, beams)}")
    return False


def _why_without_effect(choice: SamplingChoice, beams: Beams) -> str:
    if beams.num_beams > 1:
        return "has no effect in beam search; unset it, or num_beams"
    if choice.do_sample and choice.temperature == 0:
        return "has no effect at temperature 0, which is greedy; unset one of them"
    return "has no effect while sampling is off; set sampling.do_sample to true"


def _stopping(call: GenerateCall, facts: ModelFacts, limits: ResolveLimits, prompt_tokens: int) -> Stopping:
    choice = call.stopping
    # An encoder's input and a decoder's output each have the context to themselves.
    used = 0 if facts.family is Family.ENCODER_DECODER else prompt_tokens
    left = limits.context_tokens - used
    if prompt_tokens > limits.context_tokens or left < (choice.max_new_tokens or 1):
        raise _too_long(call, prompt_tokens, limits)
    most = choice.max_new_tokens or min(_default_max_new_tokens(facts, prompt_tokens), left)
    least = choice.min_new_tokens
    if least is not None and least > most:
        raise InvalidField.of("stopping.min_new_tokens", f"{least} is more than max_new_tokens, which is {most}")
    return Stopping(
        max_new_tokens=most,
        min_new_tokens=least if least is not None else min(_default_min_new_tokens(facts, prompt_tokens), most),
        eos_token_ids=() if choice.ignore_eos else facts.eos_token_ids,
        stop_token_ids=tuple(dict.fromkeys(choice.stop_token_ids)),
    )


def _default_max_new_tokens(facts: ModelFacts, prompt_tokens: int) -> int:
    """What the generation_config says. Its max_length counts a decoder's prompt, or an encoder-decoder's start."""
    if facts.generation.max_new_tokens:
        return facts.generation.max_new_tokens
    if facts.generation.max_length:
        used = 1 if facts.family is Family.ENCODER_DECODER else prompt_tokens
        if facts.generation.max_length > used:
            return facts.generation.max_length - used
    return DEFAULT_MAX_NEW_TOKENS


def _default_min_new_tokens(facts: ModelFacts, prompt_tokens: int) -> int:
    """What the generation_config says; its min_length counts as its max_length does."""
    if facts.generation.min_new_tokens is not None:
        return facts.generation.min_new_tokens
    least = facts.generation.other.get("min_length")
    used = 1 if facts.family is Family.ENCODER_DECODER else prompt_tokens
    return max(least - used, 0) if isinstance(least, int) else 0


def prompt_field(prompt: Prompt) -> str:
    """The field of the contract that holds the prompt's tokens."""
    match prompt:
        case TextPrompt():
            return "text"
        case TokenPrompt():
            return "token_ids.ids"
        case ChatPrompt():
            return "chat.messages"


def _too_long(call: GenerateCall, prompt_tokens: int, limits: ResolveLimits) -> PromptTooLong:
    context, wanted = limits.context_tokens, call.stopping.max_new_tokens
    metadata = {"prompt_tokens": str(prompt_tokens), "context_tokens": str(context)}
    if wanted is not None:
        metadata["max_new_tokens"] = str(wanted)
    if wanted is not None and prompt_tokens < context:
        field = "stopping.max_new_tokens"
        description = f"{wanted} after a prompt of {prompt_tokens} tokens; the context holds {context}"
    else:
        field = prompt_field(call.prompt)
        description = f"{prompt_tokens} tokens; the context holds {context}, at least one of them new"
    return PromptTooLong(f"{field}: {description}", violations=[FieldViolation(field, description)], metadata=metadata)


def _beams(choice: BeamChoice, defaults: GenerationDefaults) -> Beams:
    num_beams = _first(choice.num_beams, defaults.num_beams, 1)
    if num_beams <= 1:
        for name in ("length_penalty", "early_stopping"):
            if getattr(choice, name) is not None:
                raise InvalidField.of(f"beam.{name}", "has no effect without num_beams above 1")
        return Beams()
    early = defaults.other.get("early_stopping")
    return Beams(
        num_beams=num_beams,
        length_penalty=_first(choice.length_penalty, defaults.length_penalty, 1.0),
        early_stopping=_first(choice.early_stopping, early if isinstance(early, bool) else None, False),
    )


def _num_sequences(choice: ResponseChoice, defaults: GenerationDefaults, sampling: Sampling, beams: Beams) -> int:
    wanted = choice.num_return_sequences
    count = _first(wanted, defaults.num_return_sequences, 1)
    if beams.num_beams > 1:
        if count > beams.num_beams:
            text = f"{count} is more than num_beams, which is {beams.num_beams}"
            raise InvalidField.of("response.num_return_sequences", text)
    elif count > 1 and not sampling.do_sample:
        if wanted is None:
            return 1
        text = f"{count} greedy sequences would all be the same; switch on sampling or beams"
        raise InvalidField.of("response.num_return_sequences", text)
    return count


def _other_number(defaults: GenerationDefaults, name: str) -> float | None:
    value = defaults.other.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _first(wanted: T | None, default: T | None, fallback: T) -> T:
    return wanted if wanted is not None else default if default is not None else fallback
