"""The continuous engine answers as plain ``generate`` and as the padded engine do, whatever runs beside a request."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.adapter_folders import peft_alone, save_adapter
from tests.unit.engine.continuous_driving import ContinuousBench, alone, packed, reference
from tests.unit.engine.decoders import EOS, PAD, VOCAB, build
from tests.unit.engine.driving import Answer, Bench, generate_alone, prompts, request
from tests.unit.models.tokenizer_folders import byte_level, save_folder
from tokenizers import Tokenizer

from slipstream_server.inference.engine.choosing import Chooser
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import (
    AdapterPin,
    Beams,
    Constraint,
    Finished,
    GenerationRequest,
    Sampling,
    Stats,
    Stopping,
)

MODELS = ["llama", "qwen2"]
EVERYTHING_BANNED = dict.fromkeys(range(VOCAB), -float("inf"))


@cache
def crowd() -> tuple[tuple[tuple[int, ...], int], ...]:
    """64 prompts and the lengths of their answers: half of them share a stem, some repeat themselves, some hold the
    padding token.
    """
    chance = random.Random(5)
    stem = prompts([70], seed=9)[0]
    made = []
    for number in range(64):
        own = tuple(chance.randrange(3, VOCAB) for _ in range(chance.choice([1, 3, 9, 31, 40])))
        start = stem[: chance.choice([32, 64, 70])] if number % 2 else ()
        middle = own[:4] * 5 if number % 5 == 0 else (PAD,) * (number % 7 == 0)
        made.append(((*start, *middle, *own), 70 if number % 8 == 3 else chance.choice([1, 4, 9, 16])))
    return tuple(made)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"prefix_caching": False, "num_blocks": 400, "max_step_tokens": 4096, "max_running": 64},
        {"max_step_tokens": 48, "max_draft_tokens": 4},
        {"num_blocks": 9, "max_step_tokens": 40},
        {"num_blocks": 9, "max_step_tokens": 64, "max_draft_tokens": 6, "prefix_caching": False},
    ],
    ids=["all at once", "chunks and drafts", "preempted", "preempted with drafts"],
)
def test_a_crowd_is_answered_as_by_generate(name: str, options: dict[str, Any]) -> None:
    """Arrivals, cancels and deadlines at any step; what is answered in part is the beginning of the answer."""
    chance = random.Random(7)
    bench = ContinuousBench(packed(name), **options)
    is_tight = options.get("num_blocks", 400) < 10
    # Long answers outgrow the room that was free when their sequences joined.
    wanted = [(p, 70) for p, _ in crowd()[::3]] if is_tight else crowd()
    asked = [request(p, n, priority=chance.randrange(3)) for p, n in wanted]
    late = {each.id for each in asked[::9]}
    asked = [
        request(each.prompt_token_ids, each.stopping.max_new_tokens, deadline_monotonic_s=bench.now + 5)
        if each.id in late
        else each
        for each in asked
    ]
    left, cancelled = list(asked), set()
    while left:
        bench.submit(*[left.pop() for _ in range(min(len(left), chance.randrange(7)))])
        bench.step()
        victim = chance.choice(asked)
        if chance.random() < 0.15 and victim.id in bench.answers and not bench.answers[victim.id].terminals:
            bench.engine.cancel(victim.id)
            cancelled.add(victim.id)
        bench.now += 0.3
    bench.run()
    num_whole = 0
    for each in asked:
        answer = bench.answers[each.id]
        expected = list(alone(name, each.prompt_token_ids, each.stopping.max_new_tokens))
        found = answer.tokens.get(0, [])
        if each.id in cancelled or answer.failure:
            assert found == expected[: len(found)]
            assert each.id in cancelled or (answer.failure and answer.failure.reason == "DEADLINE_EXCEEDED")
        else:
            assert found == expected
            assert answer.terminals == [Finished(each.id)]
            num_whole += 1
    assert num_whole > 0.6 * len(asked)
    stats = bench.engine
    if is_tight:
        assert stats._scheduler.num_preemptions > 0
    if options.get("max_draft_tokens"):
        assert stats._outbox.totals.accepted_draft_tokens > 0
    assert (stats._scheduler.num_prefix_hits > 0) == options.get("prefix_caching", True)


def padded_bench() -> Bench:
    return Bench(reference("llama"), max_batch_size=64, max_batch_tokens=100_000)


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
    asked = [{"prompt_logprobs": 1}, {"prompt_logprobs": 1}]
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


def test_a_cancelled_or_late_search_makes_way_for_the_next() -> None:
    bench = ContinuousBench(packed("llama"))
    (prompt,) = prompts([5])
    cancelled, late, never, last = (
        request(prompt, 100, beams=Beams(num_beams=2)),
        request(prompt, 100, beams=Beams(num_beams=2), deadline_monotonic_s=bench.now + 5),
        request(prompt, 100, beams=Beams(num_beams=2)),
        request(prompt, 5, beams=Beams(num_beams=2)),
    )
    bench.submit(cancelled, late, never, last)
    bench.step()
    bench.engine.cancel(cancelled.id)
    bench.engine.cancel(never.id)
    bench.step()
    bench.step()
    bench.now += 6
    bench.run(most_steps=20)
    assert bench.answers[cancelled.id].terminals == bench.answers[never.id].terminals == []
    assert bench.answers[never.id].admissions == 0
    assert getattr(bench.answers[late.id].failure, "reason", None) == "DEADLINE_EXCEEDED"
    assert bench.answers[last.id].tokens[0] == generate_alone(reference("llama"), prompt, max_new_tokens=5, num_beams=2)


@contextmanager
def forwards_that(model: PackedModel, on_forward: Callable[[Any], None]) -> Iterator[None]:
    """Calls ``on_forward(token ids)`` before every forward."""
    handle = model.traits.model.register_forward_pre_hook(
        lambda module, args, kwargs: on_forward(kwargs["input_ids"][0]), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["cancel", "deadline", "end_sequence"])
def test_who_leaves_is_not_in_the_next_forward_and_holds_no_block(how: str) -> None:
    bench = ContinuousBench(packed("llama"), prefix_caching=False)
    kept, gone = prompts([4, 50])
    staying = request(kept, 10)
    leaving = request(gone, 10, deadline_monotonic_s=bench.now + 5)
    bench.submit(staying, leaving)
    bench.step()
    bench.step()
    assert bench.num_held == 3
    sizes: list[int] = []
    if how == "cancel":
        bench.engine.cancel(leaving.id)
    elif how == "deadline":
        bench.now += 5
    else:
        bench.engine.end_sequence(leaving.id, 0)
    with forwards_that(packed("llama"), lambda ids: sizes.append(len(ids))):
        bench.step()
    assert sizes == [1]
    assert bench.num_held == 1
    assert len(bench.answers[leaving.id].tokens[0]) == 2
    bench.run()
    assert len(bench.answers[leaving.id].terminals) == (how != "cancel")
    assert bench.answers[staying.id].tokens[0] == list(alone("llama", kept, 10))


def test_an_ended_sequence_stops_and_its_siblings_run_on() -> None:
    bench = ContinuousBench(packed("llama"))
    asked = request(prompts([8])[0], 6, num_return_sequences=3, sampling=Sampling(do_sample=True, seed=1))
    bench.submit(asked)
    while len(bench.answers[asked.id].tokens) < 3:
        bench.step()
    before = len(bench.answers[asked.id].tokens[1])
    bench.engine.end_sequence(asked.id, 1)
    bench.engine.end_sequence(asked.id, 7)
    bench.run()
    answer = bench.answers[asked.id]
    assert {index: len(tokens) for index, tokens in answer.tokens.items()} == {0: 6, 1: before, 2: 6}
    assert answer.terminals == [Finished(asked.id)]


def test_a_thousand_requests_that_come_and_go_leave_the_pool_whole() -> None:
    """Every accepted request that is not cancelled ends once; ``Answer`` refuses events after a terminal one."""
    chance = random.Random(3)
    bench = ContinuousBench(packed("llama"), 20, max_step_tokens=96, max_running=12, max_draft_tokens=3)
    stem = prompts([40])[0]
    asked, cancelled = [], set()
    for number in range(1000):
        each = request(
            (*stem[: chance.randrange(41)], number % VOCAB), chance.randrange(1, 9), priority=chance.randrange(3),
            num_return_sequences=chance.choice([1, 1, 1, 2]),
            deadline_monotonic_s=bench.now + chance.random() if number % 10 == 0 else None,
        )  # fmt: skip
        asked.append(each)
        bench.submit(each)
        if number % 20 == 19:
            bench.step()
            bench.now += 0.1
        for victim in chance.sample(asked[-30:], min(len(asked), 1)) if chance.random() < 0.93 else []:
            if not bench.answers[victim.id].terminals:
                bench.engine.cancel(victim.id)
                cancelled.add(victim.id)
    bench.run(most_steps=5000)
    assert len(cancelled) > 500
    for each in asked:
        assert len(bench.answers[each.id].terminals) == (each.id not in cancelled)


def test_a_forward_that_fails_for_one_request_fails_it_alone(caplog: pytest.LogCaptureFixture) -> None:
    def choke(ids: Any) -> None:
        if bool((ids == 13).any()):
            raise ValueError("the secret of token 13")

    fine = [tuple(token for token in prompt if token != 13) for prompt in prompts([6, 50, 9])]
    bench = ContinuousBench(packed("llama"))
    with forwards_that(packed("llama"), choke):
        poisoned, *answers = bench.run(request((13, 5), 3), *[request(prompt, 3) for prompt in fine])
    assert poisoned.failure is not None
    assert poisoned.failure.reason == "INTERNAL"
    assert "secret" not in poisoned.failure.message
    assert poisoned.failure.message.split()[-1] in caplog.text
    assert [answer.tokens[0] for answer in answers] == [list(alone("llama", prompt, 3)) for prompt in fine]


def test_memory_that_runs_out_in_mid_answer_costs_no_token() -> None:
    calls = []

    def refuse(ids: Any) -> None:
        calls.append(len(ids))
        if len(calls) % 3 == 0 and len(ids) > 1:
            raise torch.OutOfMemoryError("injected")

    asked = crowd()[:12]
    bench = ContinuousBench(packed("llama"), max_draft_tokens=4)
    with forwards_that(packed("llama"), refuse):
        answers = bench.run(*[request(prompt, 9) for prompt, _ in asked])
    assert [answer.tokens[0] for answer in answers] == [list(alone("llama", prompt, 9)) for prompt, _ in asked]


def test_a_processor_that_fails_fails_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Chooser.choose

    def choose(self: Any, logits_RV: torch.Tensor) -> Any:
        if any(row.request.sampling.no_repeat_ngram_size for row in self._processors._rows):
            raise ValueError("injected")
        return original(self, logits_RV)

    monkeypatch.setattr(Chooser, "choose", choose)
    first, second = prompts([6, 40])
    poisoned, fine = ContinuousBench(packed("llama")).run(
        request(first, 5, sampling=Sampling(no_repeat_ngram_size=2)), request(second, 5)
    )
    assert getattr(poisoned.failure, "reason", None) == "INTERNAL"
    assert fine.tokens[0] == list(alone("llama", second, 5))


@pytest.mark.parametrize("max_draft_tokens", [0, 4])
def test_scores_that_are_no_numbers_fail_their_own_request(
    max_draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence's scores turn into NaN in mid-answer, drafted or not."""
    model = packed("llama")
    original = PackedModel.run
    poisoned = request(prompts([4])[0] * 8, 30, num_return_sequences=2)
    fine = request(prompts([40])[0], 12)

    def run(self: PackedModel, chunks: Any, slots: Any) -> torch.Tensor:
        logits_MV = original(self, chunks, slots)
        end = 0
        for chunk in chunks:
            begin, end = end, end + (1 + len(chunk.drafts) if chunk.gives_token else 0)
            if chunk.sequence.row.request.id == poisoned.id and chunk.sequence.row.num_generated >= 3:
                logits_MV[begin:end] = float("nan")
        return logits_MV

    monkeypatch.setattr(PackedModel, "run", run)
    bench = ContinuousBench(model, max_draft_tokens=max_draft_tokens)
    failed, answered = bench.run(poisoned, fine)
    assert failed.failure is not None
    assert "not numbers" in failed.failure.message
    expected = list(alone("llama", poisoned.prompt_token_ids, 30))
    assert all(tokens == expected[: len(tokens)] for tokens in failed.tokens.values()), "tokens of scores that are none"
    assert answered.tokens[0] == list(alone("llama", fine.prompt_token_ids, 12))
    # What it computed may be no numbers either: nothing from before is read again.
    (again,) = bench.run(request(fine.prompt_token_ids, 12))
    assert again.tokens == answered.tokens
    assert bench.engine._scheduler.num_prefix_hits == 0


def test_a_request_larger_than_the_memory_is_refused_with_the_numbers() -> None:
    bench = ContinuousBench(packed("llama"), 2)
    large, fitting = bench.run(request((5,) * 40, 25), request((5,) * 40, 24))
    assert large.failure is not None
    assert (large.failure.reason, "65 tokens" in large.failure.message) == ("OUT_OF_MEMORY", True)
    assert "64" in large.failure.message
    assert large.admissions == 0
    assert fitting.tokens[0] == list(alone("llama", (5,) * 40, 24))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ()}, "INVALID_FIELD"),
        ({"prompt": (VOCAB,)}, "INVALID_FIELD"),
        ({"prompt": (5,) * 510}, "PROMPT_TOO_LONG"),
        ({"prompt": (5,), "adapter": AdapterPin(version="v", digest="d", folder="f")}, "UNSUPPORTED_FIELD"),
        (
            {"prompt": (5,), "sampling": Sampling(logit_bias=dict.fromkeys(range(VOCAB), -float("inf")))},
            "INVALID_FIELD",
        ),
        ({"prompt": (5,), "constraint": Constraint(kind="regex", text="a")}, "UNSUPPORTED_FIELD"),
    ],
)
def test_a_request_that_cannot_run_fails_alone(fields: dict[str, Any], reason: str) -> None:
    bad, good = ContinuousBench(packed("llama")).run(request(**fields), request((9, 8, 7), 5))
    assert getattr(bad.failure, "reason", None) == reason
    assert good.tokens[0] == list(alone("llama", (9, 8, 7), 5))


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


# Adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterPin]:
    folder = tmp_path_factory.mktemp("adapters")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    return [
        save_adapter(reference("llama"), folder / str(n), seed=n, rank=n, targets=every if n % 2 else every[:1])
        for n in range(1, 6)
    ]


@pytest.fixture
def adaptable() -> tuple[PackedModel, LoraSlots]:
    """A model with two slots."""
    model = PackedModel(Traits.of(build("llama")))
    return model, LoraSlots(model.traits.model, num_slots=2, max_rank=8)


@cache
def adapted_alone(adapter: AdapterPin | None, prompt: tuple[int, ...]) -> list[int]:
    return peft_alone(reference("llama"), adapter, prompt, max_new_tokens=8)


@pytest.mark.parametrize("max_draft_tokens", [0, 4])
def test_rows_of_many_adapters_answer_as_each_alone(
    adapters: list[AdapterPin], adaptable: tuple[PackedModel, LoraSlots], max_draft_tokens: int
) -> None:
    """The same prompt under each: no adapter reads what another has computed."""
    model, slots = adaptable
    prompt = prompts([70])[0]
    bench = ContinuousBench(model, 30, slots=slots, max_step_tokens=80, max_draft_tokens=max_draft_tokens)
    pins = [adapters[0], None, adapters[1], adapters[0], None, adapters[1]]
    answers = bench.run(*[request(prompt, 8, adapter=pin) for pin in pins])
    assert [answer.tokens[0] for answer in answers] == [adapted_alone(pin, prompt) for pin in pins]
    assert len({tuple(answer.tokens[0]) for answer in answers}) == 3
    assert bench.engine._scheduler.num_prefix_hits == 3 * 64


@pytest.mark.parametrize(("num_blocks", "max_running"), [(40, 8), (40, 1), (7, 3)])
def test_more_adapters_than_slots_all_finish(
    adapters: list[AdapterPin], adaptable: tuple[PackedModel, LoraSlots], num_blocks: int, max_running: int
) -> None:
    """Few places, little memory, several sequences a request: everybody is answered."""
    model, slots = adaptable
    bench = ContinuousBench(model, num_blocks, slots=slots, max_running=max_running)
    asked = [
        request(prompt, 8, adapter=(*adapters, None)[n % 6], num_return_sequences=1 + n % 2, priority=n % 3)
        for n, prompt in enumerate(prompts([30, 5, 60, 9] * 5))
    ]
    for each in asked:
        bench.submit(each)
        bench.step()
    bench.run(most_steps=600)
    for each in asked:
        answer = bench.answers[each.id]
        assert answer.failure is None
        expected = adapted_alone(each.adapter, each.prompt_token_ids)
        assert list(answer.tokens.values()) == [expected] * each.num_return_sequences


def test_a_request_without_a_place_does_not_hold_up_the_one_that_has_it(
    adapters: list[AdapterPin], adaptable: tuple[PackedModel, LoraSlots]
) -> None:
    """One row runs at a time, both places are held by requests whose second sequence waits, and a third adapter is
    wanted by a better ranked request.
    """
    model, slots = adaptable
    bench = ContinuousBench(model, slots=slots, max_running=2)
    first, second, third = (
        request(prompt, 8, adapter=adapter, num_return_sequences=rows, priority=priority)
        for prompt, adapter, rows, priority in zip(prompts([5, 6, 7]), adapters, [2, 2, 1], [1, 1, 0], strict=False)
    )
    bench.submit(first, second)
    bench.step()
    bench.submit(third)
    bench.run(most_steps=100)
    for each in (first, second, third):
        assert bench.answers[each.id].tokens[0] == adapted_alone(each.adapter, each.prompt_token_ids)


def test_a_swapped_version_reads_nothing_that_the_old_one_computed(
    adapters: list[AdapterPin], adaptable: tuple[PackedModel, LoraSlots]
) -> None:
    """The same name, another digest: answers change at once, and nothing comes from the prefix cache."""
    model, slots = adaptable
    old, new = adapters[0], adapters[2]
    renamed = AdapterPin(version=old.version, digest=new.digest, folder=new.folder)
    prompt = prompts([70])[0]
    bench = ContinuousBench(model, slots=slots)
    for pin, hits in ((old, 0), (renamed, 0), (old, 64), (renamed, 128)):
        (answer,) = bench.run(request(prompt, 8, adapter=pin))
        assert answer.tokens[0] == adapted_alone(pin, prompt)
        assert bench.engine._scheduler.num_prefix_hits == hits


def test_an_adapter_that_cannot_be_loaded_fails_its_own_request(
    adapters: list[AdapterPin], adaptable: tuple[PackedModel, LoraSlots], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, slots = adaptable
    missing = AdapterPin(version="v9", digest="9" * 64, folder="nothing")
    original = LoraSlots.hold

    def hold(self: LoraSlots, pin: AdapterPin) -> None:
        if pin == adapters[1]:
            raise RuntimeError("injected")
        original(self, pin)

    monkeypatch.setattr(LoraSlots, "hold", hold)
    (prompt,) = prompts([9])
    pins = [missing, adapters[0], adapters[1], None]
    lost, first, broken, base = ContinuousBench(model, slots=slots).run(
        *[request(prompt, 8, adapter=pin, num_return_sequences=2) for pin in pins]
    )
    assert getattr(lost.failure, "reason", None) == "CORRUPT_ARTIFACT"
    assert getattr(broken.failure, "reason", None) == "INTERNAL"
    assert first.tokens[1] == adapted_alone(adapters[0], prompt)
    assert base.tokens[1] == adapted_alone(None, prompt)


# Constraints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tokenizer"), byte_level())


@pytest.fixture(scope="module")
def speaking() -> PackedModel:
    """A model whose vocabulary is that of the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return PackedModel(Traits.of(LlamaForCausalLM(config).to(torch.float64).eval()))


def test_constrained_answers_match_beside_others_that_are_not(
    speaking: PackedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled beside the engine, drawn or greedy; guides survive forwards that fail in company."""
    bench = ContinuousBench(speaking, 7, grammars=Grammars(folder, 400), max_step_tokens=40, max_draft_tokens=4)
    pattern = r"[a-c]{40,50}/(cat|dog)s?"
    stopping = Stopping(max_new_tokens=80, eos_token_ids=(1,))
    guided = [
        request(
            (5, 6, 7 + seed) * 10, stopping=stopping, sampling=Sampling(do_sample=seed > 0, seed=seed),
            constraint=Constraint(kind="regex", text=pattern), num_return_sequences=2,
        )
        for seed in range(4)
    ]  # fmt: skip
    free = request((9, 8, 7), 40)
    bad = request((9, 8), 4, constraint=Constraint(kind="regex", text=r"(a)\1"))
    original, sizes = PackedModel.run, []

    def run(self: PackedModel, chunks: Any, slots: Any) -> torch.Tensor:
        sizes.append(len(chunks))
        if len(sizes) % 7 == 0 and len(chunks) > 1:
            raise RuntimeError("injected")
        return original(self, chunks, slots)

    bench.submit(*guided, free, bad)
    with monkeypatch.context() as patched:
        patched.setattr(PackedModel, "run", run)
        while bench.engine.wait_s() is not None:
            bench.step()
    assert any(size > 1 for size in sizes[6::7]), "no forward has failed"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for each in guided:
        answer = bench.answers[each.id]
        assert answer.terminals == [Finished(each.id)]
        for index, tokens in answer.tokens.items():
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            assert answer.finish_reasons[index] == "eos_token"
            assert re.fullmatch(pattern, text), text
    with speaking.as_loaded():
        expected = generate_alone(speaking.traits.model, (9, 8, 7), max_new_tokens=40)
    assert bench.answers[free.id].tokens[0] == expected
    assert bench.answers[bad.id].failure is not None
