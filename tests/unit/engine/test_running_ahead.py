"""An engine that decodes ahead answers as one that does not, whoever comes, goes, fails or loses its room meanwhile.

On a CPU, where running ahead gains nothing: the order of things is the same as on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.adapter_folders import peft_alone, save_adapter
from tests.unit.engine.continuous_driving import ContinuousBench, alone, packed, reference
from tests.unit.engine.decoders import VOCAB, build
from tests.unit.engine.driving import prompts, request
from tests.unit.engine.test_decode_graphs import OnGpuMemory

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.choosing import Chooser
from slipstream_server.inference.engine.decode_graphs import Step
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import Beams, Finished, Sampling, Stopping


@contextmanager
def forwards(model: PackedModel) -> Iterator[list[int]]:
    """Tokens of every forward, in their order."""
    sizes: list[int] = []
    handle = model.traits.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        handle.remove()


class Overwriting:
    """A stand-in for CUDA graphs whose every replay spoils what any replay before it gave."""

    def __init__(self) -> None:
        self.num_replays = 0
        self._given: list[torch.Tensor] = []

    def __call__(self, step: Step) -> Step:
        def replay() -> torch.Tensor:
            logits_RV = step()
            for earlier in self._given:
                earlier.fill_(float("nan"))
            self._given.append(logits_RV)
            self.num_replays += 1
            return logits_RV

        return replay


def crowd() -> list[tuple[tuple[int, ...], int]]:
    """Prompts, some with a stem in common, and the lengths of their answers."""
    chance = random.Random(3)
    stem = prompts([70], seed=4)[0]
    made = []
    for _ in range(24):
        own = [chance.randrange(3, VOCAB) for _ in range(chance.choice([1, 4, 33]))]
        made.append(((*stem[: chance.choice([0, 32, 64, 70])], *own), chance.choice([1, 2, 9, 16])))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 400, "max_running": 64},
        {"num_blocks": 400, "max_running": 5, "max_step_tokens": 40},
        {"num_blocks": 7, "max_step_tokens": 40},
        {"num_blocks": 7, "prefix_caching": False},
    ],
    ids=["all at once", "few at once", "preempted", "preempted without prefixes"],
)
def test_a_crowd_that_comes_and_goes_is_answered_as_by_generate(options: dict[str, Any]) -> None:
    chance = random.Random(6)
    bench = ContinuousBench(packed("llama"), runs_ahead=True, **options)
    is_tight = options["num_blocks"] < 10
    # Long answers outgrow the room that was free when their sequences joined.
    wanted = [(prompt, 70) for prompt, _ in crowd()[::3]] if is_tight else crowd()
    asked = [request(prompt, length) for prompt, length in wanted]
    left, cancelled = list(asked), set()
    while left:
        bench.submit(*[left.pop() for _ in range(min(len(left), chance.randrange(4)))])
        bench.step()
        victim = chance.choice(asked)
        if chance.random() < 0.1 and victim.id in bench.answers and not bench.answers[victim.id].terminals:
            bench.engine.cancel(victim.id)
            cancelled.add(victim.id)
    bench.run()
    for each in asked:
        found = bench.answers[each.id].tokens.get(0, [])
        expected = list(alone("llama", each.prompt_token_ids, each.stopping.max_new_tokens))
        if each.id in cancelled:
            assert found == expected[: len(found)]
        else:
            assert found == expected
            assert bench.answers[each.id].terminals == [Finished(each.id)]
    assert (bench.engine._scheduler.num_preemptions > 0) == is_tight


def test_the_next_forward_begins_before_its_token_is_handed_out() -> None:
    """And there is none for a row that is known to end."""
    bench = ContinuousBench(packed("llama"), runs_ahead=True)
    with forwards(packed("llama")) as sizes:
        bench.submit(request(prompts([9])[0], 4))
        found = []
        for _ in range(4):
            bench.step()
            found.append(list(sizes))
    assert found == [[9, 1], [9, 1, 1], [9, 1, 1, 1], [9, 1, 1, 1]]


def test_a_newcomers_prompt_runs_beside_what_was_run_ahead() -> None:
    bench = ContinuousBench(packed("llama"), runs_ahead=True)
    first, second = request(prompts([9])[0], 8), request(prompts([5], seed=2)[0], 4)
    bench.submit(first)
    bench.step()
    bench.submit(second)
    with forwards(packed("llama")) as sizes:
        bench.step()
    assert sizes == [5, 2], "the newcomer's prompt alone, then the next token of both"
    assert len(bench.answers[first.id].tokens[0]) == 2
    assert len(bench.answers[second.id].tokens[0]) == 1
    bench.run()
    for each in (first, second):
        expected = alone("llama", each.prompt_token_ids, each.stopping.max_new_tokens)
        assert tuple(bench.answers[each.id].tokens[0]) == expected


def test_replays_that_overwrite_each_other_are_not_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "IS_RECORDABLE", True)
    model = OnGpuMemory(Traits.of(build("llama", torch.float64)))
    bench = ContinuousBench(model, runs_ahead=True, max_running=8, max_step_tokens=40)
    recorder = Overwriting()
    assert model.record_decoding(recorder, 8)
    asked = [request(prompt, length) for prompt, length in crowd()[:24]]
    left = list(asked)
    while left:
        bench.submit(left.pop())
        bench.step()
    bench.run()
    assert recorder.num_replays > 20
    for each in asked:
        expected = alone("llama", each.prompt_token_ids, each.stopping.max_new_tokens)
        assert tuple(bench.answers[each.id].tokens[0]) == expected


def test_every_kind_of_choice_is_the_same_as_without() -> None:
    samplings = [
        Sampling(do_sample=True, seed=1),
        Sampling(do_sample=True, temperature=1.6, top_k=7, seed=3),
        Sampling(do_sample=True, top_p=0.7, seed=4),
        Sampling(do_sample=True, repetition_penalty=1.4, presence_penalty=0.7, no_repeat_ngram_size=2, seed=7),
        Sampling(logit_bias={5: 4.0, 9: -3.0, 17: 2.5}),
    ]
    stopping = Stopping(max_new_tokens=30, min_new_tokens=3, eos_token_ids=(10, 11, 12), stop_token_ids=(20, 21, 22))
    found = []
    for runs_ahead in (False, True):
        bench = ContinuousBench(packed("llama"), runs_ahead=runs_ahead)
        asked = [
            request(prompt, stopping=stopping, sampling=sampling, num_return_sequences=2, logprobs=3, prompt_logprobs=1)
            if sampling.do_sample
            else request(prompt, stopping=stopping, sampling=sampling)
            for sampling, prompt in zip(samplings, prompts([5, 40, 33, 2, 9], seed=2), strict=True)
        ]
        found.append(
            [(a.tokens, a.logprobs, str(a.prompt_logprobs), a.finish_reasons) for a in bench.run(*asked)]
        )  # fmt: skip
    plain, ahead = found
    assert ahead == plain
    assert any("stop_token" in reasons.values() for *_, reasons in plain)


def test_adapters_are_applied_to_what_is_run_ahead(tmp_path: Path) -> None:
    adapter = save_adapter(build("llama"), tmp_path / "one", seed=1)
    model = PackedModel(Traits.of(build("llama")))
    bench = ContinuousBench(model, runs_ahead=True, slots=LoraSlots(model.traits.model, num_slots=2, max_rank=8))
    (prompt,) = prompts([12])
    with_adapter, plain = bench.run(request(prompt, 8, adapter=adapter), request(prompt, 8))
    assert with_adapter.tokens[0] == peft_alone(reference("llama"), adapter, prompt, max_new_tokens=8)
    assert plain.tokens[0] == list(alone("llama", prompt, 8)) != with_adapter.tokens[0]


def test_a_search_between_the_steps_disturbs_nobody() -> None:
    bench = ContinuousBench(packed("llama"), runs_ahead=True)
    first, searched = prompts([5, 20])
    stream = request(first, 12)
    search = request(searched, 6, beams=Beams(num_beams=3))
    answers = bench.run(stream, search)
    assert answers[0].tokens[0] == list(alone("llama", first, 12))
    assert answers[1].tokens[0] == list(alone("llama", searched, 6, num_beams=3))


@pytest.mark.parametrize("where", ["ahead", "choosing"])
def test_a_failure_is_the_failure_of_one_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running ahead that fails costs nothing; a choice that fails after it is made again in halves."""
    bench = ContinuousBench(packed("llama"), runs_ahead=True)
    good, bad, other = [request(prompt, 6) for prompt in prompts([4, 9, 12])]
    bench.submit(good, bad, other)
    bench.step()
    bench.step()
    with monkeypatch.context() as patched:
        if where == "ahead":
            patched.setattr(PackedModel, "run_ahead", _fails)
        else:
            choose = Chooser.choose

            def fails_for_one(self: Chooser, logits_RV: torch.Tensor) -> Any:
                if any(row.request.id == bad.id for row in self._processors._rows):
                    raise RuntimeError("poisoned")
                return choose(self, logits_RV)

            patched.setattr(Chooser, "choose", fails_for_one)
        bench.step()
    bench.run()
    for each in (good, bad, other):
        answer = bench.answers[each.id]
        if each is bad and where == "choosing":
            assert getattr(answer.failure, "reason", None) == "INTERNAL"
        else:
            assert answer.tokens[0] == list(alone("llama", each.prompt_token_ids, 6))


def test_running_ahead_that_always_fails_is_given_up_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (prompt,) = prompts([9])
    tried = []

    def fails(*arguments: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no room")

    bench = ContinuousBench(packed("llama"), runs_ahead=True)
    monkeypatch.setattr(PackedModel, "run_ahead", fails)
    (answer,) = bench.run(request(prompt, 12))
    assert answer.tokens[0] == list(alone("llama", prompt, 12))
    assert len(tried) == 3
    assert caplog.text.count("running ahead failed") == 3
    assert "ends" in caplog.text


def test_failures_ahead_that_others_succeed_between_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    run_ahead = PackedModel.run_ahead

    def fails_at_times(*arguments: Any) -> Any:
        tried.append(1)
        return run_ahead(*arguments) if len(tried) % 3 == 0 else _fails()

    bench = ContinuousBench(packed("llama"), runs_ahead=True)
    monkeypatch.setattr(PackedModel, "run_ahead", fails_at_times)
    (prompt,) = prompts([9])
    (answer,) = bench.run(request(prompt, 12))
    assert answer.tokens[0] == list(alone("llama", prompt, 12))
    assert len(tried) == 11


def _fails(*arguments: Any) -> Any:
    raise RuntimeError("no room")
