"""Every field has its range, every default its source, and nothing is dropped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from slipstream_server.errors import InvalidField, InvalidRequest, PromptTooLong, UnsupportedField
from slipstream_server.inference.calls import (
    BeamChoice,
    GenerateCall,
    ResponseChoice,
    SamplingChoice,
    StoppingChoice,
    TokenPrompt,
)
from slipstream_server.inference.generation import GenerationRequest
from slipstream_server.inference.resolve import ResolveLimits, resolve
from slipstream_server.models.facts import Family
from unit.inference.conftest import llama_facts

CALL = GenerateCall(prompt=TokenPrompt(token_ids=(5, 6)))


def resolved(call: GenerateCall = CALL, *, prompt_tokens: int = 10, **generation: Any) -> GenerationRequest:
    facts = llama_facts(context_tokens=1000, vocab_size=400, **generation)
    return resolve(
        call,
        facts,
        ResolveLimits.of(facts),
        request_id=1,
        prompt_token_ids=tuple(range(5, 5 + prompt_tokens)),
        draw_seed=lambda: 77,
    )


def sampling(**choice: Any) -> GenerateCall:
    return replace(CALL, sampling=SamplingChoice(**choice))


def stopping(**choice: Any) -> GenerateCall:
    return replace(CALL, stopping=StoppingChoice(**choice))


def response(**choice: Any) -> GenerateCall:
    return replace(CALL, response=ResponseChoice(**choice))


def beams(**choice: Any) -> GenerateCall:
    return replace(CALL, beams=BeamChoice(**choice))


BAD: list[tuple[str, GenerateCall]] = [
    *(("sampling.temperature", sampling(do_sample=True, temperature=v)) for v in (-1.0, math.nan, math.inf, 101.0)),
    *(("sampling.top_p", sampling(do_sample=True, top_p=v)) for v in (0.0, 1.1, -0.5, math.nan)),
    *(("sampling.top_k", sampling(do_sample=True, top_k=v)) for v in (-1, 2**31, 2**63)),
    *(("sampling.min_p", sampling(do_sample=True, min_p=v)) for v in (-0.1, 1.1, math.nan)),
    *(("sampling.typical_p", sampling(do_sample=True, typical_p=v)) for v in (0.0, 1.1, math.nan)),
    *(("sampling.repetition_penalty", sampling(repetition_penalty=v)) for v in (0.0, -1.0, 10.1, math.inf)),
    *(("sampling.presence_penalty", sampling(presence_penalty=v)) for v in (-2.1, 2.1, math.nan)),
    *(("sampling.frequency_penalty", sampling(frequency_penalty=v)) for v in (-2.1, 2.1, -math.inf)),
    *(("sampling.no_repeat_ngram_size", sampling(no_repeat_ngram_size=v)) for v in (-1, 1025)),
    *(("sampling.seed", sampling(seed=v)) for v in (-1, 2**63)),
    *(("sampling.logit_bias", sampling(logit_bias={v: 1.0})) for v in (-1, 400, 2**40)),
    *(("sampling.logit_bias[3]", sampling(logit_bias={3: v})) for v in (math.nan, math.inf, 101.0)),
    ("sampling.logit_bias", sampling(logit_bias=dict.fromkeys(range(1025), 0.0))),
    *(("stopping.max_new_tokens", stopping(max_new_tokens=v)) for v in (0, -1, 1001, 2**31, 2**63)),
    *(("stopping.min_new_tokens", stopping(min_new_tokens=v)) for v in (-1, 2**31)),
    ("stopping.min_new_tokens", stopping(max_new_tokens=5, min_new_tokens=6)),
    *(("stopping.stop_token_ids", stopping(stop_token_ids=v)) for v in ((-1,), (400,), tuple(range(65)))),
    ("stopping.stop", stopping(stop=("x",) * 17)),
    ("stopping.stop[0]", stopping(stop=("",))),
    ("stopping.stop[1]", stopping(stop=("a", "b\0"))),
    ("stopping.stop[0]", stopping(stop=("\ud800",))),
    *(("response.num_return_sequences", response(num_return_sequences=v)) for v in (0, -1, 17, 2**31)),
    *(("response.logprobs", response(logprobs=v)) for v in (-1, 21)),
    *(("response.prompt_logprobs", response(prompt_logprobs=v)) for v in (-1, 21)),
    *(("num_beams", beams(num_beams=v)) for v in (0, -1, 17, 2**31)),
    *(("beam.length_penalty", beams(num_beams=2, length_penalty=v)) for v in (math.nan, math.inf, 11.0)),
    # Combinations.
    ("response.num_return_sequences", response(num_return_sequences=2)),
    (
        "response.num_return_sequences",
        replace(response(num_return_sequences=2), sampling=SamplingChoice(do_sample=True, temperature=0.0)),
    ),
    ("response.num_return_sequences", replace(response(num_return_sequences=3), beams=BeamChoice(num_beams=2))),
    ("num_beams", replace(beams(num_beams=2), sampling=SamplingChoice(do_sample=True))),
    ("beam.length_penalty", beams(length_penalty=1.0)),
    ("beam.early_stopping", beams(num_beams=1, early_stopping=True)),
    ("sampling.temperature", sampling(temperature=0.7)),
    ("sampling.temperature", sampling(do_sample=False, temperature=0.7)),
    ("sampling.top_p", sampling(top_p=0.9)),
    ("sampling.top_k", sampling(top_k=50)),
    ("sampling.min_p", sampling(min_p=0.1)),
    ("sampling.typical_p", sampling(typical_p=0.9)),
    ("sampling.top_p", sampling(do_sample=True, temperature=0.0, top_p=0.5)),
    ("sampling.temperature", replace(beams(num_beams=2), sampling=SamplingChoice(temperature=0.5))),
]


@pytest.mark.parametrize(("field", "call"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_field_is_named(field: str, call: GenerateCall) -> None:
    with pytest.raises(InvalidField) as caught:
        resolved(call)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert caught.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("sampling.presence_penalty", replace(beams(num_beams=2), sampling=SamplingChoice(presence_penalty=1.0))),
        ("response.logprobs", replace(beams(num_beams=2), response=ResponseChoice(logprobs=1))),
    ],
)
def test_what_beams_cannot_honour_is_unsupported(field: str, call: GenerateCall) -> None:
    with pytest.raises(UnsupportedField, match=field):
        resolved(call)


GOOD: list[GenerateCall] = [
    sampling(do_sample=True, temperature=100.0, top_p=1.0, top_k=2**31 - 1, min_p=1.0, typical_p=1.0),
    sampling(do_sample=True, top_p=1e-6, seed=2**63 - 1),
    sampling(temperature=0.0, top_p=1.0, top_k=0, seed=3),
    sampling(temperature=1.0),
    sampling(repetition_penalty=10.0, presence_penalty=-2.0, frequency_penalty=2.0, no_repeat_ngram_size=3),
    stopping(max_new_tokens=990),
    stopping(max_new_tokens=5, min_new_tokens=5, stop=("x" * 256,) * 16),
    response(logprobs=20, prompt_logprobs=0),
    replace(response(num_return_sequences=16), sampling=SamplingChoice(do_sample=True)),
    replace(response(num_return_sequences=4), beams=BeamChoice(num_beams=4)),
]


@pytest.mark.parametrize("call", GOOD, ids=range(len(GOOD)))
def test_the_ends_of_the_ranges_are_allowed(call: GenerateCall) -> None:
    resolved(call)


def test_unset_means_greedy_512_tokens_and_the_models_end() -> None:
    request = resolved()
    assert request.sampling.do_sample is False
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (1.0, 0, 1.0)
    assert (request.stopping.max_new_tokens, request.stopping.eos_token_ids) == (512, (1,))
    assert resolved(prompt_tokens=900).stopping.max_new_tokens == 100


def test_the_models_generation_config_fills_what_is_unset() -> None:
    config: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 7,
        "eos_token_id": [1, 2],
    }
    request = resolved(CALL, repetition_penalty=1.2, **config)
    chosen = request.sampling
    assert (chosen.do_sample, chosen.temperature, chosen.top_p, chosen.top_k) == (True, 0.6, 0.9, 20)
    assert chosen.repetition_penalty == 1.2
    assert (request.stopping.max_new_tokens, request.stopping.eos_token_ids) == (7, (1, 2))
    overridden = resolved(sampling(temperature=0.9, top_k=0), **config).sampling
    assert (overridden.temperature, overridden.top_k, overridden.top_p) == (0.9, 0, 0.9)
    assert resolved(sampling(do_sample=False), **config).sampling.do_sample is False
    assert resolved(sampling(temperature=0.0), **config).sampling.do_sample is False


def test_max_length_of_the_generation_config_counts_the_prompt() -> None:
    assert resolved(max_length=50).stopping.max_new_tokens == 40
    assert resolved(max_length=5).stopping.max_new_tokens == 512


@pytest.mark.parametrize(
    ("generation", "prompt_tokens", "expected"),
    [
        ({"min_length": 30}, 10, 20),
        ({"min_length": 30}, 40, 0),
        ({"min_length": 30, "min_new_tokens": 3}, 10, 3),
        ({"min_length": 900, "max_new_tokens": 50}, 10, 50),
        ({"min_new_tokens": 4}, 10, 4),
    ],
)
def test_the_models_least_length_is_kept(generation: dict[str, int], prompt_tokens: int, expected: int) -> None:
    assert resolved(prompt_tokens=prompt_tokens, **generation).stopping.min_new_tokens == expected
    own = resolved(stopping(min_new_tokens=1), prompt_tokens=prompt_tokens, **generation)
    assert own.stopping.min_new_tokens == 1


def test_a_least_length_of_an_encoder_decoder_counts_its_start_token() -> None:
    facts = replace(llama_facts(min_length=30), family=Family.ENCODER_DECODER)
    request = resolve(CALL, facts, ResolveLimits.of(facts), request_id=1, prompt_token_ids=(5,) * 100)
    assert request.stopping.min_new_tokens == 29


def test_ignore_eos_leaves_no_end_token() -> None:
    assert resolved(stopping(ignore_eos=True)).stopping.eos_token_ids == ()


def test_a_seed_is_drawn_once_where_none_is_given() -> None:
    assert resolved(sampling(do_sample=True)).sampling.seed == 77
    assert resolved(sampling(do_sample=True, seed=0)).sampling.seed == 0


@pytest.mark.parametrize(("prompt_tokens", "max_new_tokens"), [(1000, None), (1001, None), (5000, 1), (990, 11)])
def test_too_long_a_prompt_says_the_numbers(prompt_tokens: int, max_new_tokens: int | None) -> None:
    with pytest.raises(PromptTooLong) as caught:
        resolved(stopping(max_new_tokens=max_new_tokens), prompt_tokens=prompt_tokens)
    metadata = {"prompt_tokens": str(prompt_tokens), "context_tokens": "1000"}
    if max_new_tokens is not None:
        metadata["max_new_tokens"] = str(max_new_tokens)
    assert caught.value.metadata == metadata
    assert isinstance(caught.value, InvalidRequest)
    fits_alone = prompt_tokens < 1000
    assert [v.field for v in caught.value.violations] == ["stopping.max_new_tokens" if fits_alone else "token_ids.ids"]


def test_a_context_just_filled_is_allowed() -> None:
    assert resolved(stopping(max_new_tokens=10), prompt_tokens=990).stopping.max_new_tokens == 10
    assert resolved(prompt_tokens=999).stopping.max_new_tokens == 1
