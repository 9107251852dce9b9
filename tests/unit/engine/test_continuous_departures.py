"""Who leaves the continuous engine early, fails in it or is refused costs the others nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench, alone, packed, reference
from tests.unit.engine.crowds import crowd
from tests.unit.engine.decoders import VOCAB
from tests.unit.engine.driving import generate_alone, prompts, request

from slipstream_server.inference.engine.choosing import Chooser
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.generation import (
    AdapterPin,
    Beams,
    Constraint,
    Finished,
    GenerationRequest,
    Sampling,
)


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


def test_a_search_reads_its_prompt_beside_the_others_and_stops_in_it() -> None:
    bench = ContinuousBench(packed("llama"), max_step_tokens=32)
    stream, searched = request(prompts([5])[0], 40), request(prompts([200])[0], 20, beams=Beams(num_beams=4))
    bench.submit(stream)
    bench.step()
    bench.submit(searched)
    read: list[int] = []
    decoder = bench.engine._traits.model.get_decoder()
    count = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with contextlib.ExitStack() as stack:
        stack.callback(count.remove)
        for _ in range(3):
            bench.step()
        assert sorted(read) == [1, 1, 1, 32, 32, 32], "a piece for every token of the stream"
        bench.engine.cancel(searched.id)
        bench.step()
        bench.step()
        assert max(read[6:]) == 1, "it read on though nobody wants it"
    bench.run()
    assert bench.answers[searched.id].terminals == []
    assert bench.answers[stream.id].tokens[0] == list(alone("llama", stream.prompt_token_ids, 40))


def test_a_search_whose_beams_exceed_the_memory_is_refused() -> None:
    bench = ContinuousBench(packed("llama"), num_blocks=8)
    (fits, beyond) = (request(prompts([40])[0], 24, beams=Beams(num_beams=beams)) for beams in (4, 5))
    answers = bench.run(fits, beyond)
    assert len(answers[0].tokens[0]) == 24
    assert answers[1].failure is not None
    assert answers[1].failure.reason == "OUT_OF_MEMORY"
    assert "320 tokens by 5 beams exceed the KV memory of 256 tokens" in answers[1].failure.message


def test_who_waited_before_the_worker_is_served_by_when_it_came() -> None:
    bench = ContinuousBench(packed("llama"), max_running=1)
    (prompt,) = prompts([5])
    first, late, early = (request(prompt, 3, arrival_monotonic_s=bench.now - waited_s) for waited_s in (0.0, 1.0, 5.0))
    bench.submit(first)
    bench.step()
    bench.submit(late, early)
    while not bench.answers[late.id].terminals:
        bench.step()
    assert bench.answers[early.id].terminals


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


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_thousand_requests_cancelled_at_random_leave_the_pool_whole(runs_ahead: bool) -> None:
    """Anybody at any time: who waits, who is in the middle of the prompt or of the answer. All others end once;
    ``Answer`` refuses events after a terminal one.
    """
    chance = random.Random(3)
    bench = ContinuousBench(
        packed("llama"), 24, max_step_tokens=60, max_running=16, max_draft_tokens=0 if runs_ahead else 3,
        runs_ahead=runs_ahead,
    )  # fmt: skip
    stem = prompts([60])[0]
    asked: list[GenerationRequest] = []
    live: list[int] = []
    cancelled: dict[int, int] = {}
    while len(cancelled) < 1000:
        for _ in range(min(3, 20 - len(live))):
            each = request(
                (*stem[: chance.randrange(61)], chance.randrange(3, VOCAB)), chance.randrange(1, 50),
                priority=chance.randrange(3), num_return_sequences=chance.choice([1, 1, 1, 2]),
                deadline_monotonic_s=bench.now + 3 * chance.random() if chance.random() < 0.1 else None,
            )  # fmt: skip
            asked.append(each)
            bench.submit(each)
            live.append(each.id)
        bench.step()
        bench.now += 0.1
        live = [request_id for request_id in live if not bench.answers[request_id].terminals]
        for victim in chance.sample(live, min(len(live), chance.choice([0, 1, 2, 4]), 1000 - len(cancelled))):
            bench.engine.cancel(victim)
            live.remove(victim)
            cancelled[victim] = sum(map(len, bench.answers[victim].tokens.values()))
    bench.run(most_steps=5000)
    assert sum(num_said > 0 for num_said in cancelled.values()) > 300, "who was cancelled had hardly begun"
    assert sum(bench.answers[victim].admissions == 0 for victim in cancelled) > 100
    for each in asked:
        assert len(bench.answers[each.id].terminals) == (each.id not in cancelled)
    last = request(stem, 40)
    assert bench.run(last)[0].tokens[0] == list(alone("llama", stem, 40))
    assert sorted(bench.engine._pool.take(24)) == list(range(24))


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
    assert poisoned.failure.metadata["error_id"] in caplog.text
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
