"""The life of requests in the padded engine: one terminal event each, rows that leave within a step, failures that
stay alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.engine.driving import EOS, Bench, generate_alone, prompts, request, tiny_model

from slipstream_server.inference.engine.batch import surviving_order
from slipstream_server.inference.generation import AdapterPin, Failed, Finished, Sampling, Stats, Stopping, Tokens


@contextmanager
def forwards_that(model: Any, on_forward: Any) -> Iterator[list[int]]:
    """Calls ``on_forward(rows)`` before every forward of ``model``; yields the row counts of all forwards."""
    seen: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", kwargs.get("decoder_input_ids"))
        seen.append(ids.shape[0])
        on_forward(ids)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def ignore(ids: Any) -> None:
    """Lets a forward be."""


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_cancelled_row_is_gone_at_the_next_step(name: str) -> None:
    model = tiny_model(name)
    bench = Bench(model)
    kept, cancelled = (request(prompt, 10) for prompt in prompts([4, 30]))
    bench.submit(kept, cancelled)
    with forwards_that(model, ignore) as rows:
        bench.step()
        bench.step()
        bench.engine.cancel(cancelled.id)
        bench.step()
    assert rows[-3:] == [2, 2, 1]
    (answer,) = bench.run()[:0] or [bench.answers[kept.id]]
    assert answer.tokens[0] == generate_alone(model, kept.prompt_token_ids, max_new_tokens=10)
    assert bench.answers[cancelled.id].terminals == []
    assert len(bench.answers[cancelled.id].tokens[0]) == 2


def test_cancelling_everything_ends_the_batch_and_waiting_requests_never_run() -> None:
    model = tiny_model("llama")
    bench = Bench(model, max_batch_size=1)
    running, waiting = (request(prompt) for prompt in prompts([4, 5]))
    bench.submit(running, waiting)
    bench.step()
    bench.engine.cancel(waiting.id)
    bench.engine.cancel(running.id)
    bench.engine.cancel(987_654)
    with forwards_that(model, ignore) as rows:
        bench.run()
    assert rows == []
    assert bench.answers[waiting.id].admissions == 0


def test_deadlines_end_running_and_waiting_requests() -> None:
    bench = Bench(tiny_model("llama"), max_batch_size=2)
    late, kept, waiting = (
        request(prompt, 10, deadline_monotonic_s=deadline)
        for prompt, deadline in zip(prompts([4, 5, 6]), [bench.now + 5, None, bench.now + 5], strict=True)
    )
    bench.submit(late, kept, waiting)
    bench.step()
    bench.now += 5
    bench.step()
    for request_id in (late.id, waiting.id):
        failure = bench.answers[request_id].failure
        assert failure is not None
        assert failure.reason == "DEADLINE_EXCEEDED"
    assert len(bench.answers[late.id].tokens[0]) == 1
    bench.run()
    assert bench.answers[kept.id].finish_reasons == {0: "length"}


def test_a_deadline_wakes_an_idle_engine() -> None:
    bench = Bench(tiny_model("llama"), max_queue_delay_ms=60_000)
    bench.submit(request((5,), deadline_monotonic_s=bench.now + 2))
    bench.step()
    assert bench.engine.wait_s() == pytest.approx(2)


def test_an_ended_sequence_stops_and_its_siblings_run_on() -> None:
    bench = Bench(tiny_model("llama"))
    (prompt,) = prompts([8])
    asked = request(prompt, 6, num_return_sequences=3, sampling=Sampling(do_sample=True, seed=1))
    bench.submit(asked)
    bench.step()
    bench.engine.end_sequence(asked.id, 1)
    bench.run()
    answer = bench.answers[asked.id]
    assert {index: len(tokens) for index, tokens in answer.tokens.items()} == {0: 6, 1: 1, 2: 6}
    assert answer.terminals == [Finished(asked.id)]


def test_ending_the_last_sequence_finishes_the_request() -> None:
    bench = Bench(tiny_model("llama"))
    asked = request((5, 6), 6)
    bench.submit(asked)
    bench.step()
    bench.engine.end_sequence(asked.id, 0)
    bench.engine.end_sequence(asked.id, 7)
    bench.run()
    assert bench.answers[asked.id].terminals == [Finished(asked.id)]


def test_sequences_of_a_request_share_the_prefill_of_their_prompt() -> None:
    model = tiny_model("llama")
    with forwards_that(model, ignore) as rows:
        Bench(model).run(request((5, 6, 7), 3, num_return_sequences=4))
    assert rows == [1, 4, 4]


def out_of_memory_above(most_rows: int) -> Any:
    def refuse(ids: Any) -> None:
        if ids.shape[0] > most_rows:
            raise torch.OutOfMemoryError("out of memory (injected)")

    return refuse


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_batch_too_large_for_the_memory_is_split_and_answers_the_same(name: str) -> None:
    model = tiny_model(name)
    asked = prompts([4, 9, 1, 22, 7])
    bench = Bench(model)
    with forwards_that(model, out_of_memory_above(2)):
        answers = bench.run(*[request(prompt, 6) for prompt in asked])
    assert [answer.tokens[0] for answer in answers] == [generate_alone(model, p, max_new_tokens=6) for p in asked]


def test_memory_that_runs_out_in_mid_answer_costs_no_token() -> None:
    """The third decode step fails once for many rows; the halves go on from the tokens they have."""
    model = tiny_model("llama")
    asked = prompts([4, 9, 30])
    calls = []

    def refuse_once(ids: Any) -> None:
        calls.append(ids.shape)
        if len(calls) == 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with forwards_that(model, refuse_once):
        answers = Bench(model).run(*[request(prompt, 8) for prompt in asked])
    assert [answer.tokens[0] for answer in answers] == [generate_alone(model, p, max_new_tokens=8) for p in asked]
    assert all(answer.admissions == 1 for answer in answers)


def test_one_row_too_large_for_the_memory_fails_by_name() -> None:
    model = tiny_model("llama")
    with forwards_that(model, out_of_memory_above(0)):
        answers = Bench(model).run(*[request(prompt) for prompt in prompts([4, 5])])
    assert [answer.failure.reason for answer in answers if answer.failure] == ["OUT_OF_MEMORY"] * 2


def test_a_poisoned_request_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A forward that breaks on one prompt: the others are answered, and the engine serves on."""
    model = tiny_model("llama")

    def choke(ids: Any) -> None:
        if bool((ids == 13).any()):
            raise ValueError("the secret of token 13")

    bench = Bench(model)
    fine, other = ([token for token in prompt if token != 13] for prompt in prompts([6, 9]))
    with forwards_that(model, choke):
        answers = bench.run(request(fine, 3), request((13, 5), 3), request(other, 3))
    assert [bool(answer.failure) for answer in answers] == [False, True, False]
    failure = answers[1].failure
    assert failure is not None
    assert failure.reason == "INTERNAL"
    assert "secret" not in failure.message
    assert failure.metadata["error_id"] in caplog.text
    (again,) = bench.run(request(fine, 3))
    assert again.tokens == answers[0].tokens


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"prompt": ()}, "INVALID_FIELD", "prompt"),
        ({"prompt": (5, 211)}, "INVALID_FIELD", "prompt.token_ids"),
        ({"prompt": (-1,)}, "INVALID_FIELD", "prompt.token_ids"),
        ({"prompt": (5,) * 250}, "PROMPT_TOO_LONG", "prompt"),
        ({"sampling": Sampling(temperature=float("nan"))}, "INVALID_FIELD", "sampling.temperature"),
        ({"sampling": Sampling(top_p=1.5)}, "INVALID_FIELD", "sampling.top_p"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, "INVALID_FIELD", "sampling.repetition_penalty"),
        ({"sampling": Sampling(logit_bias={4000: 1.0})}, "INVALID_FIELD", "sampling.logit_bias"),
        ({"sampling": Sampling(logit_bias={4: float("inf")})}, "INVALID_FIELD", "sampling.logit_bias"),
        ({"stopping": Stopping(max_new_tokens=0)}, "INVALID_FIELD", "stopping.max_new_tokens"),
        ({"logprobs": 1001}, "INVALID_FIELD", "response.logprobs"),
        ({"prompt_logprobs": 10**7}, "INVALID_FIELD", "response.prompt_logprobs"),
        ({"num_return_sequences": 0}, "INVALID_FIELD", "response.num_return_sequences"),
        ({"adapter": AdapterPin(version="v3", digest="d", folder="f")}, "UNSUPPORTED_FIELD", "adapter"),
        (
            {"sampling": Sampling(logit_bias=dict.fromkeys(range(211), -float("inf")))},
            "INVALID_FIELD",
            "sampling",
        ),
    ],
)
def test_a_request_that_cannot_run_fails_alone(change: dict[str, Any], reason: str, field: str) -> None:
    model = tiny_model("llama")
    fields: dict[str, Any] = {"prompt": (5, 6), **change}
    good = request((9, 8, 7), 5)
    bad = request(**fields)
    bad_answer, answer = Bench(model).run(bad, good)
    assert bad_answer.failure is not None
    assert (bad_answer.failure.reason, bad_answer.failure.message.split(":")[0]) == (reason, field)
    assert answer.tokens[0] == generate_alone(model, (9, 8, 7), max_new_tokens=5)


def test_encoder_decoders_have_no_prompt_logprobs() -> None:
    (answer,) = Bench(tiny_model("t5")).run(request((5, 6), prompt_logprobs=1))
    assert answer.failure is not None
    assert answer.failure.reason == "UNSUPPORTED_FIELD"


def test_stats_add_up() -> None:
    bench = Bench(tiny_model("llama"))
    bench.submit(*[request(prompt, 4) for prompt in prompts([3, 5])])
    last = None
    while bench.engine.wait_s() == 0.0:
        last = next((event for event in bench.step() if isinstance(event, Stats)), last)
        bench.now += 1
    assert last is not None
    assert (last.num_running, last.num_waiting, last.kv_tokens) == (0, 0, 0)
    assert (last.prompt_tokens_total, last.generation_tokens_total) == (8, 8)
    assert (last.steps_total, last.batch_rows_total) == (4, 8)


@given(st.lists(st.booleans(), max_size=20))
def test_compaction_moves_no_row_that_may_stay(is_live: list[bool]) -> None:
    order = surviving_order(is_live)
    assert sorted(order) == [index for index, alive in enumerate(is_live) if alive]
    assert all(source == place or (not is_live[place] and source >= len(order)) for place, source in enumerate(order))


actions = st.lists(
    st.tuples(st.sampled_from(["submit", "step", "step", "cancel", "end", "late", "choke"]), st.integers(0, 10**6)),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions)
def test_every_request_that_is_not_cancelled_ends_in_one_terminal_event(script: list[tuple[str, int]]) -> None:
    """Any order of commands, deadlines and failures; ``Answer`` refuses events after a terminal one."""
    model = tiny_model("llama")
    bench = Bench(model, max_batch_size=4, max_batch_tokens=100)
    asked: list[Any] = []
    cancelled: set[int] = set()
    choking = [False]

    def maybe_choke(ids: Any) -> None:
        if choking[0]:
            choking[0] = False
            raise torch.OutOfMemoryError("injected")

    with forwards_that(model, maybe_choke):
        for action, number in script:
            if action == "submit":
                stopping = Stopping(max_new_tokens=1 + number % 5, eos_token_ids=tuple(range(EOS, EOS + number % 90)))
                deadline = bench.now + 3 if number % 4 == 0 else None
                prompt = prompts([1 + number % 13], seed=number)[0]
                asked.append(
                    request(
                        prompt, stopping=stopping, num_return_sequences=1 + number % 3, deadline_monotonic_s=deadline,
                        sampling=Sampling(do_sample=bool(number % 2), seed=number), priority=number % 3,
                    )
                )  # fmt: skip
                bench.submit(asked[-1])
            elif action == "step":
                bench.step()
            elif action == "late":
                bench.now += number % 4
            elif action == "choke":
                choking[0] = True
            elif asked:
                victim = asked[number % len(asked)]
                if action == "end":
                    bench.engine.end_sequence(victim.id, number % victim.num_return_sequences)
                elif not bench.answers[victim.id].terminals:
                    bench.engine.cancel(victim.id)
                    cancelled.add(victim.id)
        bench.run()
    for each in asked:
        terminals = bench.answers[each.id].terminals
        assert len(terminals) <= 1
        assert terminals or each.id in cancelled
        assert all(isinstance(event, Finished | Failed) for event in terminals)
    assert not any(isinstance(event, Tokens) for event in bench.step())
