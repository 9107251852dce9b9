"""Prompts of very different lengths in one batch get the answers that plain ``generate`` gives each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import reference
from tests.unit.engine.driving import EOS, Bench, generate_alone, prompts, request, tiny_model

from slipstream_server.inference.generation import Sampling, Stopping

DECODERS = ["llama", "qwen2", "gemma3", "gpt2"]
# Their own attention, whose positions come from the mask or from the end of the row. In float64, that of Bloom and MPT
# makes padding no numbers by itself: it adds the least float64 there is to scores in float32.
ONLY_PADDED = {
    "falcon-rope": torch.float64,
    "falcon-alibi": torch.float64,
    "bloom": torch.float32,
    "mpt": torch.float32,
}
ALL = [*DECODERS, *ONLY_PADDED, "t5", "bart"]
LENGTHS = [1, 23, 4, 60, 11]


def model_of(name: str) -> Any:
    return reference(name, ONLY_PADDED[name]) if name in ONLY_PADDED else tiny_model(name)


@pytest.mark.parametrize("name", ALL)
def test_greedy_rows_equal_generate_alone(name: str) -> None:
    model = model_of(name)
    bench = Bench(model)
    answers = bench.run(*[request(prompt, 16) for prompt in prompts(LENGTHS)])
    expected = [
        generate_alone(model, prompt, max_new_tokens=16, forced_eos_token_id=None) for prompt in prompts(LENGTHS)
    ]
    assert [answer.tokens[0] for answer in answers] == expected
    assert all(answer.finish_reasons == {0: "length"} for answer in answers)
    assert bench.steps <= 18, "the rows did not share their steps"


@pytest.mark.parametrize("name", ALL)
def test_rows_that_end_leave_the_others_alone(name: str) -> None:
    """Different lengths to generate: rows leave one after the other, and the batch is compacted and trimmed around
    the rest.
    """
    model = model_of(name)
    wanted = list(zip(prompts(LENGTHS), [20, 3, 13, 1, 30], strict=True))
    answers = Bench(model).run(*[request(prompt, tokens) for prompt, tokens in wanted])
    expected = [generate_alone(model, p, max_new_tokens=tokens, forced_eos_token_id=None) for p, tokens in wanted]
    assert [answer.tokens[0] for answer in answers] == expected


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (Sampling(repetition_penalty=1.7), {"repetition_penalty": 1.7}),
        (Sampling(no_repeat_ngram_size=1), {"no_repeat_ngram_size": 1}),
        (Sampling(no_repeat_ngram_size=2), {"no_repeat_ngram_size": 2}),
        (
            Sampling(no_repeat_ngram_size=3, repetition_penalty=0.8),
            {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
        ),
        (
            Sampling(logit_bias={5: 4.0, 9: -3.0, 17: 2.5}, repetition_penalty=1.3),
            {"sequence_bias": {(5,): 4.0, (9,): -3.0, (17,): 2.5}, "repetition_penalty": 1.3},
        ),
    ],
)
def test_processed_greedy_rows_equal_generate_alone(name: str, sampling: Sampling, settings: dict[str, object]) -> None:
    """Neighbours without these options share the batch and do not feel them."""
    model = tiny_model(name)
    first, second, third = prompts([3, 40, 12], seed=1)
    answers = Bench(model).run(request(first, sampling=sampling), request(second), request(third, sampling=sampling))
    assert [answer.tokens[0] for answer in answers] == [
        generate_alone(model, first, max_new_tokens=12, **settings),
        generate_alone(model, second, max_new_tokens=12),
        generate_alone(model, third, max_new_tokens=12, **settings),
    ]


def ends_of(name: str, prompt: tuple[int, ...]) -> tuple[int, int]:
    """Two tokens that the greedy answer holds, the second one for the first time after the first one."""
    answer = generate_alone(tiny_model(name), prompt, max_new_tokens=12, forced_eos_token_id=None)
    later = next(token for token in answer[3:] if token not in answer[:3])
    return answer[1], later


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_end_tokens_end_and_are_the_last_token(name: str) -> None:
    prompt, other = prompts([9, 30], seed=3)
    early, late = ends_of(name, prompt)
    model = tiny_model(name)
    by_eos, by_stop, unending = Bench(model).run(
        request(prompt, stopping=Stopping(max_new_tokens=12, eos_token_ids=(late, EOS))),
        request(prompt, stopping=Stopping(max_new_tokens=12, eos_token_ids=(EOS,), stop_token_ids=(early,))),
        request(other, 12),
    )
    assert by_eos.tokens[0] == generate_alone(model, prompt, max_new_tokens=12, eos_token_id=[late, EOS])
    assert (by_eos.tokens[0][-1], by_eos.finish_reasons) == (late, {0: "eos_token"})
    assert by_stop.tokens[0] == generate_alone(model, prompt, max_new_tokens=12, eos_token_id=[early, EOS])
    assert (by_stop.tokens[0][-1], by_stop.finish_reasons) == (early, {0: "stop_token"})
    assert unending.finish_reasons == {0: "length"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_min_new_tokens_bans_every_end(name: str) -> None:
    prompt, other = prompts([9, 30], seed=3)
    early, late = ends_of(name, prompt)
    model = tiny_model(name)
    stopping = Stopping(max_new_tokens=12, min_new_tokens=6, eos_token_ids=(early,), stop_token_ids=(late,))
    held_back, _ = Bench(model).run(request(prompt, stopping=stopping), request(other))
    expected = generate_alone(model, prompt, max_new_tokens=12, min_new_tokens=6, eos_token_id=[early, late])
    assert held_back.tokens[0] == expected
    assert not {early, late} & set(held_back.tokens[0][:6])


def test_forced_end_of_the_models_own_rules() -> None:
    """BART's generation_config forces its end token at the length limit, unless ends are ignored."""
    model = tiny_model("bart")
    (prompt,) = prompts([14], seed=5)
    stopping = Stopping(max_new_tokens=7, eos_token_ids=(EOS,))
    (answer,) = Bench(model).run(request(prompt, stopping=stopping))
    assert answer.tokens[0] == generate_alone(model, prompt, max_new_tokens=7, eos_token_id=EOS)
    assert answer.tokens[0][-1] == EOS
