"""The continuous engine answers as plain ``generate`` and as the padded engine do, whatever runs beside a request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench, alone, packed, padded_bench, reference
from tests.unit.engine.decoders import EOS
from tests.unit.engine.driving import Answer, generate_alone, prompts, request

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.generation import Beams, GenerationRequest, Sampling, Stats, Stopping

SAMPLED = [
    Sampling(do_sample=True, seed=1),
    Sampling(do_sample=True, temperature=0.4, seed=2),
    Sampling(do_sample=True, temperature=1.6, top_k=7, seed=3),
    Sampling(do_sample=True, top_p=0.7, seed=4),
    Sampling(do_sample=True, min_p=0.1, seed=5),
    Sampling(do_sample=True, typical_p=0.6, seed=6),
    Sampling(do_sample=True, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.3, seed=7),
    Sampling(do_sample=True, no_repeat_ngram_size=2, logit_bias={5: 3.0, 8: -100.0}, seed=8),
    Sampling(repetition_penalty=1.7),
    Sampling(no_repeat_ngram_size=1),
    Sampling(logit_bias={5: 4.0, 9: -3.0, 17: 2.5}),
    Sampling(presence_penalty=1.5, frequency_penalty=0.5),
]


def with_every_option() -> list[GenerationRequest]:
    """The same requests each time, under new ids."""
    made = []
    for number, (sampling, prompt) in enumerate(zip(SAMPLED, prompts([5, 40, 33, 2] * 3, seed=2), strict=True)):
        ends = tuple(range(10, 10 + 3 * number))
        stopping = Stopping(
            max_new_tokens=10, min_new_tokens=number % 4, eos_token_ids=ends[::2], stop_token_ids=ends[1::2]
        )
        made.append(
            request(
                prompt, stopping=stopping, sampling=sampling, num_return_sequences=1 + number % 3,
                logprobs=(None, 0, 3)[number % 3], prompt_logprobs=(None, 2, 0, None)[number % 4],
            )
        )  # fmt: skip
    return made


def same(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert one.finish_reasons == other.finish_reasons
    for ours, theirs in (
        *[(one.logprobs[index], other.logprobs[index]) for index in one.tokens],
        (one.prompt_logprobs, other.prompt_logprobs),
    ):
        assert [place.top_token_ids for place in ours] == [place.top_token_ids for place in theirs]
        for our, their in zip(ours, theirs, strict=True):
            assert our.logprob == pytest.approx(their.logprob, abs=1e-5, nan_ok=True)
            assert our.top_logprobs == pytest.approx(their.top_logprobs, abs=1e-5)


@pytest.mark.parametrize("num_blocks", [200, 6])
def test_every_option_answers_in_company_as_alone_and_as_the_padded_engine(num_blocks: int) -> None:
    company = ContinuousBench(packed("llama"), num_blocks, max_step_tokens=40, max_draft_tokens=4)
    together = company.run(*with_every_option())
    by_padded = padded_bench().run(*with_every_option())
    for answer, expected, each in zip(together, by_padded, with_every_option(), strict=True):
        same(answer, expected)
        if num_blocks == 200:
            same(ContinuousBench(packed("llama")).run(each)[0], expected)


def test_prompt_logprobs_of_chunks_that_end_with_one_token_beside_drafts() -> None:
    """A prompt of 129 tokens is read in two chunks; the second one is a single token, whose prompt repeats itself."""
    prompt = prompts([4])[0] * 32 + (9,)
    prompt = (*prompt[1:], prompt[0])
    asked: list[dict[str, Any]] = [{"prompt_logprobs": 1}, {"prompt_logprobs": 1}]
    found = ContinuousBench(packed("llama"), max_step_tokens=512, max_draft_tokens=4).run(
        *[request(prompt, 5, **fields) for fields in asked]
    )
    expected = padded_bench().run(*[request(prompt, 5, **fields) for fields in asked])
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    assert len(found[0].prompt_logprobs) == 129


def test_end_tokens_and_limits_equal_generate() -> None:
    prompt = prompts([9], seed=3)[0]
    answer = alone("llama", prompt, 12)
    early, late = answer[1], next(token for token in answer[3:] if token not in answer[:3])
    bench = ContinuousBench(packed("llama"), max_draft_tokens=4)
    by_eos, by_stop, held_back, ignored = bench.run(
        request(prompt, stopping=Stopping(max_new_tokens=12, eos_token_ids=(late, EOS))),
        request(prompt, stopping=Stopping(max_new_tokens=12, eos_token_ids=(EOS,), stop_token_ids=(early,))),
        request(prompt, stopping=Stopping(max_new_tokens=12, min_new_tokens=6, eos_token_ids=(early, late))),
        request(prompt, 12),
    )
    model = reference("llama")
    assert by_eos.tokens[0] == generate_alone(model, prompt, max_new_tokens=12, eos_token_id=[late, EOS])
    assert by_eos.finish_reasons == {0: "eos_token"}
    assert by_stop.tokens[0] == list(answer[:2])
    assert by_stop.finish_reasons == {0: "stop_token"}
    assert held_back.tokens[0] == generate_alone(
        model, prompt, max_new_tokens=12, min_new_tokens=6, eos_token_id=[early, late]
    )
    assert ignored.tokens[0] == list(answer)
    assert ignored.finish_reasons == {0: "length"}


def test_a_drafted_answer_takes_fewer_steps_and_its_blocks_are_read_again() -> None:
    """An answer that repeats its prompt; a second turn finds the blocks that drafts have filled."""
    prompt = prompts([4])[0] * 20
    answer = alone("llama", prompt, 60)
    plain, drafting = ContinuousBench(packed("llama")), ContinuousBench(packed("llama"), max_draft_tokens=8)
    steps = []
    for bench in (plain, drafting):
        bench.engine._model.use(64)
        bench.submit(asked := request((*prompt, *answer[:30]) * 2, 40))
        expected = list(alone("llama", asked.prompt_token_ids, 40))
        while not bench.answers[asked.id].terminals:
            bench.step()
        assert bench.answers[asked.id].tokens[0] == expected
        steps.append(bench.engine.num_steps)
        again = request((*asked.prompt_token_ids, *expected, 7, 8), 4)
        (found,) = bench.run(again)
        assert found.tokens[0] == list(alone("llama", again.prompt_token_ids, 4))
        computed = len(asked.prompt_token_ids) + len(expected) - 1
        assert bench.engine._scheduler.num_prefix_hits == computed // BLOCK_TOKENS * BLOCK_TOKENS


def test_streams_go_on_during_a_beam_search() -> None:
    bench = ContinuousBench(packed("llama"))
    first, second, searched = prompts([5, 40, 20])
    streams = [request(first, 24), request(second, 24)]
    searches = [
        request(searched, 12, beams=Beams(num_beams=3, length_penalty=0.8), num_return_sequences=2),
        request(first, 6, beams=Beams(num_beams=2)),
    ]
    bench.submit(*streams, *searches)
    lengths = []
    while not bench.answers[searches[0].id].terminals:
        bench.step()
        lengths.append(len(bench.answers[streams[0].id].tokens[0]))
    assert len(lengths) >= 12
    assert lengths == list(range(1, len(lengths) + 1)), "a stream waited for the search"
    bench.run()
    ids = torch.tensor([searched])
    with torch.inference_mode():
        found = reference("llama").generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, length_penalty=0.8, num_return_sequences=2,
            max_new_tokens=12, do_sample=False, eos_token_id=None,
        )  # fmt: skip
    answer = bench.answers[searches[0].id]
    assert [answer.tokens[0], answer.tokens[1]] == found[:, 20:].tolist()
    expected = generate_alone(reference("llama"), first, max_new_tokens=6, num_beams=2)
    assert bench.answers[searches[1].id].tokens[0] == expected
    for each in streams:
        assert bench.answers[each.id].tokens[0] == list(alone("llama", each.prompt_token_ids, 24))


def test_stats_add_up() -> None:
    bench = ContinuousBench(packed("llama"), 10)
    bench.submit(*[request(prompt, 4) for prompt in prompts([3, 50])])
    seen = []
    while bench.engine.wait_s() == 0.0:
        seen += [event for event in bench.step() if isinstance(event, Stats)]
        bench.now += 1
    assert (seen[0].num_running, seen[0].num_waiting, seen[0].kv_tokens) == (2, 0, 96)
    last = seen[-1]
    assert (last.num_running, last.num_waiting, last.kv_tokens, last.kv_capacity_tokens) == (0, 0, 0, 320)
    assert (last.prompt_tokens_total, last.generation_tokens_total) == (53, 8)
    assert (last.steps_total, last.batch_rows_total) == (4, 8)
