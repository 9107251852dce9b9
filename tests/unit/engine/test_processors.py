"""Score processors against transformers' own on rows without padding, and the two penalties it does not have by
hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.driving import Bench, prompts, request, tiny_model
from transformers import GenerationConfig
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from slipstream_server.inference.engine.choosing import Chooser
from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.processors import HouseRules, Processors, tokens_completing_ngrams
from slipstream_server.inference.generation import Sampling, Stopping

VOCAB = 40


def row_of(context: list[int], generated: list[int], **fields: Any) -> Row:
    row = Row(request(context, 100, **fields), 0, np.array(context))
    for token in generated:
        row.append(token)
    return row


def scores_for(rows: list[Row], seed: int = 0) -> torch.Tensor:
    return torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4


def processed(rows: list[Row], scores: torch.Tensor, rules: HouseRules | None = None) -> torch.Tensor:
    result = scores.clone()
    Processors(rows, rules or HouseRules()).apply(result)
    return result


def by_transformers(row: Row, scores_V: torch.Tensor) -> torch.Tensor:
    sampling, stopping = row.request.sampling, row.request.stopping
    steps: list[Any] = []
    if sampling.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        steps.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if stopping.min_new_tokens:
        ends = [*stopping.eos_token_ids, *stopping.stop_token_ids]
        steps.append(MinNewTokensLengthLogitsProcessor(row.num_context, stopping.min_new_tokens, ends))
    scores = scores_V[None].clone()
    for step in steps:
        scores = step(torch.from_numpy(row.tokens.copy())[None], scores)
    return scores[0]


tokens = st.integers(3, 12)  # few of them, so that they repeat
rows_strategy = st.builds(
    row_of,
    st.lists(tokens, min_size=1, max_size=12),
    st.lists(tokens, max_size=8),
    sampling=st.builds(
        Sampling,
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.9]),
        no_repeat_ngram_size=st.integers(0, 4),
        logit_bias=st.dictionaries(tokens, st.floats(-5, 5, width=32), max_size=3),
    ),
    stopping=st.builds(
        Stopping,
        max_new_tokens=st.just(100),
        min_new_tokens=st.sampled_from([0, 3, 50]),
        eos_token_ids=st.sampled_from([(2,), (2, 30)]),
        stop_token_ids=st.sampled_from([(), (31,)]),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows_strategy, min_size=1, max_size=6), st.integers(0, 1000))
def test_mixed_rows_equal_transformers_one_by_one(rows: list[Row], seed: int) -> None:
    scores = scores_for(rows, seed)
    expected = torch.stack([by_transformers(row, scores_V) for row, scores_V in zip(rows, scores, strict=True)])
    torch.testing.assert_close(processed(rows, scores), expected)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    """OpenAI's formula: score - presence * [count > 0] - frequency * count, without the prompt."""
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    row = row_of([7, 7, 8], [9, 8, 9, 9], sampling=sampling)
    scores = scores_for([row])
    change = (processed([row], scores) - scores)[0]
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[9], expected[8] = -0.5 - 3 * 0.25, -0.5 - 0.25
    torch.testing.assert_close(change, expected)


def test_counts_follow_a_row_as_it_grows() -> None:
    """Beside numpy's own counting, from far more different tokens than there is room for at first."""
    drawn = np.random.default_rng(3).integers(0, 300, size=600).tolist()
    row = row_of(drawn[:100], [])
    for token in drawn[100:]:
        row.append(token)
        if token % 7:  # not looked at after every token
            continue
        for (found, counts), whole in ((row.counts, row.tokens), (row.counts_generated, row.generated)):
            expected, expected_counts = np.unique(whole, return_counts=True)
            order = np.argsort(found)
            assert found[order].tolist() == expected.tolist()
            assert counts[order].tolist() == expected_counts.tolist()


def test_neutral_rows_need_no_step_and_stay_as_they_are() -> None:
    neutral, other = row_of([5, 6], [7]), row_of([5, 6], [7], sampling=Sampling(repetition_penalty=1.5))
    assert not Processors([neutral], HouseRules()).are_needed
    scores = scores_for([neutral, other])
    result = processed([neutral, other], scores)
    assert torch.equal(result[0], scores[0])
    assert not torch.equal(result[1], scores[1])


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 2, 1, 2]), (2, [1]), (3, [1]), (4, []), (5, []), (9, [])])
def test_ngram_bans_by_hand(size: int, expected: list[int]) -> None:
    assert tokens_completing_ngrams(np.array([1, 2, 1, 2]), size).tolist() == expected


def test_house_rules_of_a_generation_config() -> None:
    config = GenerationConfig(
        suppress_tokens=[4],
        begin_suppress_tokens=[5],
        bad_words_ids=[[6], [7, 8]],
        forced_bos_token_id=9,
        forced_eos_token_id=2,
    )
    rules = HouseRules.of(config, is_encoder_decoder=True)
    assert rules == HouseRules(suppressed=(4, 6), suppressed_first=(5,), forced_first=9, forced_last=(2,))
    assert HouseRules.of(config, is_encoder_decoder=False).forced_first is None
    stopping = Stopping(max_new_tokens=4, eos_token_ids=(2,))
    first, second, third, last = [row_of([0], [11] * number, stopping=stopping) for number in range(4)]
    result = processed([first, second, third, last], torch.zeros(4, VOCAB), rules)
    allowed = [set(row.isfinite().nonzero()[:, 0].tolist()) for row in result]
    every = set(range(VOCAB))
    assert allowed == [{9}, every - {4, 5, 6}, every - {4, 6}, {2}]


def test_a_row_without_a_choice_is_told_apart() -> None:
    """One row bans everything, one gets NaN from the model; the third is served."""
    everything = Sampling(logit_bias=dict.fromkeys(range(VOCAB), -float("inf")))
    rows = [row_of([5], [], sampling=everything), row_of([5], []), row_of([5], [])]
    scores = scores_for(rows).float()
    scores[1] = float("nan")
    best = int(scores[2].argmax())
    choices = Chooser(rows, HouseRules(), torch.device("cpu")).choose(scores).read()
    assert choices.is_exhausted == [True, False, False]
    assert choices.is_broken == [False, True, False]
    assert choices.token_ids[2] == best


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Before temperature, penalties and bans: log_softmax of the logits of a plain forward."""
    model = tiny_model("llama")
    (prompt, other) = prompts([9, 25])
    sampling = Sampling(do_sample=True, temperature=0.4, seed=3, repetition_penalty=1.8, logit_bias={7: 9.0}, top_k=5)
    answer, _, top_zero = Bench(model).run(
        request(prompt, sampling=sampling, logprobs=3), request(other), request(prompt, logprobs=0)
    )
    full = torch.tensor([[*prompt, *answer.tokens[0]]])
    with torch.inference_mode():
        raw = model(full).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    assert len(answer.logprobs[0]) == 12
    for position, token, row in zip(answer.logprobs[0], answer.tokens[0], raw, strict=True):
        best = row.topk(3)
        assert position.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert position.top_token_ids == best.indices.tolist()
        assert position.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5)
    assert all(position.top_token_ids == [] and position.logprob < 0 for position in top_zero.logprobs[0])


def test_prompt_logprobs_cover_every_position() -> None:
    model = tiny_model("gpt2")
    short, long = prompts([1, 33])
    answers = Bench(model).run(request(long, prompt_logprobs=2), request(short, prompt_logprobs=0))
    with torch.inference_mode():
        raw = model(torch.tensor([long])).logits[0].float().log_softmax(dim=-1)
    found = answers[0].prompt_logprobs
    assert len(found) == 33
    assert np.isnan(found[0].logprob)
    for place in range(1, 33):
        assert found[place].logprob == pytest.approx(float(raw[place - 1, long[place]]), abs=1e-5)
        assert found[place].top_token_ids == raw[place - 1].topk(2).indices.tolist()
    assert len(answers[1].prompt_logprobs) == 1
