"""Beam search through the engine equals ``model.generate`` of each prompt alone, and what it cannot honour is refused
by name.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench
from tests.unit.engine.driving import EOS, Bench, generate_alone, prompts, request, tiny_model

from slipstream_server.inference.engine.beam_rules import unsupported_with_beams
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import AdapterPin, Beams, Sampling, Stopping


def beams_alone(model: Any, prompt: tuple[int, ...], **settings: Any) -> list[list[int]]:
    """All returned sequences of a plain ``generate``, cut behind their first end token."""
    ids = torch.tensor([list(prompt)])
    ends = {settings["eos_token_id"]} if settings.get("eos_token_id") is not None else set()
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    answers = []
    for row in found[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beams_of_a_batch_equal_generate_alone(name: str, early_stopping: bool) -> None:
    model = tiny_model(name)
    eos = generate_alone(model, prompts([9])[0], max_new_tokens=12, forced_eos_token_id=None)[4]
    asked = prompts([3, 20, 9])
    answers = Bench(model).run(
        *[
            request(
                prompt,
                beams=Beams(num_beams=3, length_penalty=0.8, early_stopping=early_stopping),
                stopping=Stopping(max_new_tokens=10, eos_token_ids=(eos,)),
                num_return_sequences=2,
            )
            for prompt in asked
        ]
    )
    for prompt, answer in zip(asked, answers, strict=True):
        expected = beams_alone(
            model, prompt, num_beams=3, length_penalty=0.8, early_stopping=early_stopping, max_new_tokens=10,
            eos_token_id=eos, num_return_sequences=2,
        )  # fmt: skip
        assert [answer.tokens[0], answer.tokens[1]] == expected


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (Sampling(repetition_penalty=1.6), {"repetition_penalty": 1.6}),
        (Sampling(no_repeat_ngram_size=2), {"no_repeat_ngram_size": 2}),
        (Sampling(logit_bias={5: 3.0}), {"sequence_bias": {(5,): 3.0}}),
    ],
)
def test_processors_with_beams_equal_generate_alone(sampling: Sampling, settings: dict[str, Any]) -> None:
    """Prompts of different lengths, so that padding would show."""
    model = tiny_model("llama")
    asked = prompts([4, 19, 4])
    answers = Bench(model).run(*[request(prompt, 8, beams=Beams(num_beams=3), sampling=sampling) for prompt in asked])
    for prompt, answer in zip(asked, answers, strict=True):
        expected = beams_alone(model, prompt, num_beams=3, max_new_tokens=8, eos_token_id=None, **settings)
        assert [answer.tokens[0]] == expected


def test_min_new_tokens_and_stop_tokens_with_beams() -> None:
    model = tiny_model("llama")
    (prompt,) = prompts([9])
    plain = beams_alone(model, prompt, num_beams=2, max_new_tokens=8, eos_token_id=None)[0]
    stopping = Stopping(max_new_tokens=8, min_new_tokens=4, eos_token_ids=(EOS,), stop_token_ids=(plain[1],))
    (answer,) = Bench(model).run(request(prompt, beams=Beams(num_beams=2), stopping=stopping))
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 9), num_beams=2, max_new_tokens=8, min_new_tokens=4,
            eos_token_id=[EOS, plain[1]], do_sample=False,
        )[0, 9:].tolist()  # fmt: skip
    assert answer.tokens[0] == found[: len(answer.tokens[0])]
    assert plain[1] not in answer.tokens[0][:4]


def test_a_length_penalty_that_leaves_no_scores_is_an_error_and_its_neighbours_are_answered() -> None:
    model = tiny_model("llama")
    asked = prompts([5, 6, 7])
    penalties = (-1.0, -10.0, 1.0)
    answers = Bench(model).run(
        *[
            request(prompt, 12, beams=Beams(num_beams=4, length_penalty=penalty), num_return_sequences=2)
            for prompt, penalty in zip(asked, penalties, strict=True)
        ]
    )
    failure = answers[1].failure
    assert failure is not None
    assert failure.reason == "INVALID_FIELD"
    for prompt, penalty, answer in zip(asked, penalties, answers, strict=True):
        if answer.failure is None:
            expected = beams_alone(
                model, prompt, num_beams=4, max_new_tokens=12, length_penalty=penalty, num_return_sequences=2
            )
            assert [answer.tokens[0], answer.tokens[1]] == expected
    assert sum(answer.failure is None for answer in answers) == 2


def test_searches_of_different_settings_and_plain_requests_are_all_answered() -> None:
    model = tiny_model("llama")
    first, second = prompts([5, 6])
    narrow, wide, plain = Bench(model).run(
        request(first, 6, beams=Beams(num_beams=2)), request(second, 9, beams=Beams(num_beams=4)), request(first, 6)
    )
    assert [narrow.tokens[0]] == beams_alone(model, first, num_beams=2, max_new_tokens=6, eos_token_id=None)
    assert [wide.tokens[0]] == beams_alone(model, second, num_beams=4, max_new_tokens=9, eos_token_id=None)
    assert plain.tokens[0] == generate_alone(model, first, max_new_tokens=6)


@pytest.mark.parametrize("batching", ["padded", "continuous"])
def test_a_search_among_scores_that_are_no_numbers_ends_in_an_error(batching: str) -> None:
    """Of one prompt alone: whoever comes after it is answered."""
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    bad, good = prompts([5, 6])
    bench = Bench(model) if batching == "padded" else ContinuousBench(PackedModel(Traits.of(model)))
    with torch.no_grad():
        model.get_input_embeddings().weight[bad[-1]] = float("nan")
    assert bad[-1] not in good
    failed, answered = bench.run(
        request(bad, 6, beams=Beams(num_beams=2)), request(good, 6, beams=Beams(num_beams=2, length_penalty=0.8))
    )
    assert failed.failure is not None
    assert failed.failure.reason == "INTERNAL"
    assert [answered.tokens[0]] == beams_alone(
        plain, good, num_beams=2, length_penalty=0.8, max_new_tokens=6, eos_token_id=None
    )


@pytest.mark.parametrize("batching", ["padded", "continuous"])
@pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_what_a_checkpoint_says_of_caches_changes_no_search(settings: dict[str, Any], batching: str) -> None:
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    model.generation_config.update(**settings)
    prompt = prompts([7])[0]
    bench = Bench(model) if batching == "padded" else ContinuousBench(PackedModel(Traits.of(model)))
    (answer,) = bench.run(request(prompt, 8, beams=Beams(num_beams=3)))
    assert [answer.tokens[0]] == beams_alone(plain, prompt, num_beams=3, max_new_tokens=8, eos_token_id=None)


def test_a_search_is_cancelled_between_its_tokens_and_its_neighbour_is_not() -> None:
    model = tiny_model("llama")
    bench = Bench(model)
    polls = []
    kept, cancelled = (request(prompt, 20, beams=Beams(num_beams=3)) for prompt in prompts([5, 6]))

    def cancel_at_third() -> None:
        polls.append(None)
        if len(polls) == 3:
            bench.engine.cancel(cancelled.id)

    bench.on_poll = cancel_at_third
    bench.run(kept, cancelled)
    expected = beams_alone(model, kept.prompt_token_ids, num_beams=3, max_new_tokens=20, eos_token_id=None)
    assert [bench.answers[kept.id].tokens[0]] == expected
    assert bench.answers[cancelled.id].terminals == []
    assert bench.answers[cancelled.id].tokens == {}


def test_a_search_whose_requests_are_all_over_stops_at_once() -> None:
    bench = Bench(tiny_model("llama"))
    polls = []
    asked = request((5, 6), 100, beams=Beams(num_beams=2), deadline_monotonic_s=bench.now + 1)

    def pass_time() -> None:
        polls.append(None)
        bench.now += 0.5

    bench.on_poll = pass_time
    (answer,) = bench.run(asked)
    assert answer.failure is not None
    assert answer.failure.reason == "DEADLINE_EXCEEDED"
    assert len(polls) == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": Sampling(do_sample=True)}, "sampling.do_sample"),
        ({"sampling": Sampling(presence_penalty=0.1)}, "sampling.presence_penalty"),
        ({"sampling": Sampling(frequency_penalty=0.1)}, "sampling.frequency_penalty"),
        ({"logprobs": 0}, "response.logprobs"),
        ({"prompt_logprobs": 1}, "response.prompt_logprobs"),
        ({"num_return_sequences": 3}, "response.num_return_sequences"),
        ({"adapter": AdapterPin(version="v1", digest="d", folder="f")}, "adapter"),
    ],
)
def test_what_beams_cannot_honour_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    asked = request((5, 6), beams=Beams(num_beams=2), **fields)
    assert [name for name, _ in unsupported_with_beams(asked)] == [field]
    (answer,) = Bench(tiny_model("llama")).run(asked)
    assert answer.failure is not None
    assert answer.failure.reason == "UNSUPPORTED_FIELD"
    assert answer.failure.message.startswith(field)


def test_without_beams_nothing_is_refused() -> None:
    assert unsupported_with_beams(request((5,), sampling=Sampling(do_sample=True), logprobs=1)) == []
