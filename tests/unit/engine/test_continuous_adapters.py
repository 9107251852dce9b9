"""Adapters in the continuous engine: every row answers as PEFT does alone, however few places there are."""

from __future__ import annotations

from functools import cache

import pytest
from tests.unit.engine.adapter_folders import peft_alone, save_adapter
from tests.unit.engine.continuous_driving import ContinuousBench, reference
from tests.unit.engine.decoders import build
from tests.unit.engine.driving import prompts, request

from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import AdapterPin


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
