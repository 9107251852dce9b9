"""Adapters in a shared batch: every row answers as PeftModel does alone; what is wrong with one is nobody else's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.adapter_folders import WEIGHTS, change_weights, peft_alone, pin, save_adapter
from tests.unit.engine.driving import Bench, generate_alone, prompts, request, tiny_model

from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.generation import AdapterPin, Beams, Sampling, Stats, Stopping

EVERY_LINEAR: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def slots_of(model: Any, num_slots: int = 8, max_rank: int = 16) -> LoraSlots:
    return LoraSlots(model, num_slots=num_slots, max_rank=max_rank)


def bench_of(model: Any, num_slots: int = 8, **limits: Any) -> tuple[Bench, LoraSlots]:
    slots = slots_of(model, num_slots)
    return Bench(model, slots=slots, max_batch_adapters=num_slots, **limits), slots


@pytest.mark.parametrize("name", sorted(EVERY_LINEAR))
def test_every_row_of_a_mixed_batch_answers_as_its_adapter_alone(name: str, tmp_path: Path) -> None:
    """Two adapters of different rank and targets, the base, unequal prompts and lengths: rows leave one by one."""
    model = tiny_model(name)
    targets = EVERY_LINEAR[name]
    first = save_adapter(model, tmp_path / "1", seed=1, targets=targets, rank=4, fan_in_fan_out=name == "gpt2")
    second = save_adapter(
        model, tmp_path / "2", seed=2, targets=targets[:1], rank=7, use_rslora=True, fan_in_fan_out=name == "gpt2"
    )
    adapters = [first, None, second, first, None, second]
    asked = [
        request(prompt, length, adapter=adapter)
        for prompt, length, adapter in zip(prompts([5, 19, 3, 11, 7, 2]), [12, 4, 15, 6, 20, 9], adapters, strict=True)
    ]
    bench, _ = bench_of(model)
    answers = bench.run(*asked)
    for each, answer in zip(asked, answers, strict=True):
        alone = peft_alone(model, each.adapter, each.prompt_token_ids, max_new_tokens=each.stopping.max_new_tokens)
        assert answer.tokens[0] == alone
    plain = generate_alone(model, asked[0].prompt_token_ids, max_new_tokens=12)
    assert answers[0].tokens[0] != plain, "the adapter changes nothing, so the test shows nothing"


def test_the_versions_at_hand_are_reported_until_others_take_their_slots(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapters = [save_adapter(model, tmp_path / str(n), seed=n, targets=["q_proj"], rank=2) for n in (1, 2, 3)]
    bench, _ = bench_of(model, num_slots=2)
    for number, adapter in enumerate(adapters, 1):
        bench.submit(request(prompts([4])[0], 2, adapter=adapter))
        events = [event for _ in range(20) for event in bench.step()]
        last = [event for event in events if isinstance(event, Stats)][-1]
        assert last.adapters == tuple([held.version for held in adapters[max(0, number - 2) : number]])


def test_patterns_scale_modules_as_peft_does(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = save_adapter(
        model, tmp_path / "1", seed=3, targets=["q_proj", "o_proj"], rank=4, lora_alpha=9,
        rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"o_proj": 3},
    )  # fmt: skip
    asked = [request(prompt, 10, adapter=adapter) for prompt in prompts([6, 9])]
    for each, answer in zip(asked, bench_of(model)[0].run(*asked), strict=True):
        assert answer.tokens[0] == peft_alone(model, adapter, each.prompt_token_ids, max_new_tokens=10)


def test_the_model_is_untouched_whenever_no_row_wants_an_adapter(tmp_path: Path) -> None:
    """Base-only batches pay nothing: between them and the plain model there is no difference at all."""
    model = copy.deepcopy(tiny_model("llama"))
    adapter = save_adapter(model, tmp_path / "1", seed=1)
    prompt, other = prompts([5, 6])
    bench, _ = bench_of(model)

    def wrapped() -> list[str]:
        return [name for name, module in model.named_modules() if "forward" in vars(module)]

    bench.submit(request(prompt, 3, adapter=adapter), request(other, 6))
    seen = []
    while bench.engine.wait_s() == 0.0:
        bench.step()
        seen.append(wrapped())
    # Three steps with the adapter's row, then that row has left.
    assert [len(names) for names in seen[:4]] == [4, 4, 4, 0]
    assert {name.rpartition(".")[2] for name in seen[0]} == {"q_proj", "v_proj"}
    bench.run(request(prompt, 3))
    assert wrapped() == []


def test_sampling_logprobs_and_several_sequences_work_with_adapters(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = save_adapter(model, tmp_path / "1", seed=1)
    prompt = prompts([9])[0]
    sampling = Sampling(do_sample=True, temperature=0.9, seed=5)
    asked = request(prompt, 6, sampling=sampling, num_return_sequences=3, adapter=adapter, logprobs=2)
    mixed, _ = bench_of(model)[0].run(asked, request(prompt, 9))
    alone = bench_of(model)[0].run(request(prompt, 6, sampling=sampling, num_return_sequences=3, adapter=adapter))[0]
    assert mixed.tokens == alone.tokens
    assert all(len(found) == 6 for found in mixed.logprobs.values())
    asked = request(prompt, 1, prompt_logprobs=1, adapter=adapter)
    found = bench_of(model)[0].run(asked, request(prompt, 2))[0].prompt_logprobs
    from peft import PeftModel

    with torch.inference_mode():
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), adapter.folder).eval()
        logits_TV = adapted(torch.tensor([prompt])).logits[0]
    expected = logits_TV.log_softmax(dim=1)[torch.arange(8), torch.tensor(prompt[1:])]
    assert torch.allclose(torch.tensor([place.logprob for place in found[1:]]), expected.float(), atol=1e-5)


def test_beams_refuse_an_adapter_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = save_adapter(model, tmp_path / "1", seed=1)
    prompt = prompts([5])[0]
    bench, _ = bench_of(model)
    beams = Beams(num_beams=2)
    refused, _, searched = bench.run(
        request(prompt, 4, adapter=adapter, beams=beams), request(prompt, 4, adapter=adapter),
        request(prompt, 4, beams=beams),
    )  # fmt: skip
    assert refused.failure is not None
    assert (refused.failure.reason, "adapter" in refused.failure.message) == ("UNSUPPORTED_FIELD", True)
    assert searched.tokens[0] == generate_alone(model, prompt, max_new_tokens=4, num_beams=2)


def test_the_least_recently_used_adapter_gives_way_and_comes_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapters = [save_adapter(model, tmp_path / str(n), seed=n, rank=n) for n in (1, 2, 3)]
    prompt = prompts([8])[0]
    alone = {each.digest: peft_alone(model, each, prompt, max_new_tokens=6) for each in adapters}
    bench, slots = bench_of(model, num_slots=2)
    for turn in (0, 1, 0, 2, 1, 0):
        adapter = adapters[turn]
        assert bench.run(request(prompt, 6, adapter=adapter))[0].tokens[0] == alone[adapter.digest]
        assert slots.held[-1] == adapter.digest
    assert set(slots.held) == {adapters[0].digest, adapters[1].digest}
    # Nothing of an adapter stays behind in its slot.
    assert bench.run(request(prompt, 6))[0].tokens[0] == generate_alone(model, prompt, max_new_tokens=6)


def test_one_batch_names_no_more_adapters_than_there_are_slots(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapters = [save_adapter(model, tmp_path / str(n), seed=n) for n in (1, 2, 3, 4, 5)]
    asked = [request(prompt, 5, adapter=each) for each, prompt in zip(adapters, prompts([4, 5, 6, 7, 8]), strict=True)]
    bench, _ = bench_of(model, num_slots=2)
    for each, answer in zip(asked, bench.run(*asked), strict=True):
        assert answer.tokens[0] == peft_alone(model, each.adapter, each.prompt_token_ids, max_new_tokens=5)


def test_adapters_are_known_by_digest_not_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    old, new = (save_adapter(model, tmp_path / str(n), seed=n) for n in (1, 2))
    renamed = AdapterPin(version=old.version, digest=new.digest, folder=new.folder)
    prompt = prompts([8])[0]
    bench, _ = bench_of(model)
    for adapter in (old, renamed):
        found = bench.run(request(prompt, 6, adapter=adapter))[0].tokens[0]
        assert found == peft_alone(model, adapter, prompt, max_new_tokens=6)


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _truncate(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-100])


def _not_a_number(folder: Path) -> None:
    change_weights(folder, lambda tensor: tensor * float("nan"))


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _wider(folder: Path) -> None:
    change_weights(folder, lambda tensor: tensor.repeat(1, 2) if tensor.shape[1] > 4 else tensor)


def _gone(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, "CORRUPT_ARTIFACT"),
        (_not_a_number, "CORRUPT_ARTIFACT"),
        (_gone, "CORRUPT_ARTIFACT"),
        (_pickled, "UNSAFE_WEIGHTS"),
        (_wider, "INCOMPATIBLE_ADAPTER"),
        (_edit_config(r=5), "CORRUPT_ARTIFACT"),
        (_edit_config(lora_alpha="many"), "CORRUPT_ARTIFACT"),
        (_edit_config(auto_map={"x": "y"}), "UNSAFE_WEIGHTS"),
        (_edit_config(use_dora=True), "INCOMPATIBLE_ADAPTER"),
        (_edit_config(modules_to_save=["lm_head"]), "INCOMPATIBLE_ADAPTER"),
        (_edit_config(bias="all"), "INCOMPATIBLE_ADAPTER"),
        (_edit_config(peft_type="IA3"), "INCOMPATIBLE_ADAPTER"),
        (_edit_config(init_lora_weights="pissa"), "INCOMPATIBLE_ADAPTER"),
        (_edit_config(never_heard_of=1), "INCOMPATIBLE_ADAPTER"),
    ],
)
def test_a_bad_adapter_fails_its_own_request_only(spoil: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    bad, good = (save_adapter(model, tmp_path / str(n), seed=n) for n in (1, 2))
    spoil(tmp_path / "1")
    prompt = prompts([8])[0]
    asked = [request(prompt, 6, adapter=each) for each in (good, bad, None)]
    bench, slots = bench_of(model)
    answers = bench.run(*asked)
    failure = answers[1].failure
    assert failure is not None
    assert failure.reason == reason, failure.message
    assert str(tmp_path) not in failure.message
    for each, answer in ((asked[0], answers[0]), (asked[2], answers[2])):
        assert answer.tokens[0] == peft_alone(model, each.adapter, prompt, max_new_tokens=6)
    assert slots.held == (good.digest,)


def test_other_bases_and_higher_ranks_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    foreign = save_adapter(tiny_model("gpt2"), tmp_path / "1", seed=1, targets=["c_attn"], fan_in_fan_out=True)
    high = save_adapter(model, tmp_path / "2", seed=2, rank=17)
    embedding = save_adapter(model, tmp_path / "3", seed=3, targets=["embed_tokens"])
    prompt = prompts([8])[0]
    answers = bench_of(model)[0].run(*[request(prompt, 3, adapter=each) for each in (foreign, high, embedding)])
    assert [answer.failure and answer.failure.reason for answer in answers] == ["INCOMPATIBLE_ADAPTER"] * 3
    assert "rank 17 is above 16" in (answers[1].failure.message if answers[1].failure else "")


def test_weights_that_overflow_fail_their_own_rows_only(tmp_path: Path) -> None:
    """Finite numbers that are too large for the sums: the poisoned row's scores are no numbers, its neighbours' are."""
    model = copy.deepcopy(tiny_model("llama")).float()
    poisoned, good = (save_adapter(model, tmp_path / str(n), seed=n) for n in (1, 2))
    change_weights(tmp_path / "1", lambda tensor: tensor.sign() * 3e38)
    prompt = prompts([8])[0]
    answers = bench_of(model)[0].run(*[request(prompt, 6, adapter=each) for each in (good, poisoned, None)])
    assert answers[1].failure is not None
    assert "not numbers" in answers[1].failure.message
    assert answers[0].tokens[0] == peft_alone(model, good, prompt, max_new_tokens=6)
    assert answers[2].tokens[0] == generate_alone(model, prompt, max_new_tokens=6)


def test_a_step_that_fails_narrows_down_with_adapters_in_place(tmp_path: Path) -> None:
    """Halves of a failed batch run anew, and still with each row's own adapter."""
    model = copy.deepcopy(tiny_model("llama"))
    adapters = [save_adapter(model, tmp_path / str(n), seed=n) for n in (1, 2)]
    asked = [request(prompt, 6, adapter=each) for each, prompt in zip(adapters * 2, prompts([4, 5, 6, 7]), strict=True)]
    expected = [peft_alone(model, each.adapter, each.prompt_token_ids, max_new_tokens=6) for each in asked]
    bench, _ = bench_of(model)
    original, calls = model.forward, [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("boom")
        return original(*args, **kwargs)

    model.forward = failing
    answers = bench.run(*asked)
    assert [answer.tokens[0] for answer in answers] == expected


def test_eos_and_a_missing_folder(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = save_adapter(model, tmp_path / "1", seed=1)
    prompt = prompts([8])[0]
    alone = peft_alone(model, adapter, prompt, max_new_tokens=10)
    ends = Stopping(max_new_tokens=10, eos_token_ids=(alone[4],))
    missing = pin(tmp_path / "nothing", 9)
    answered, failed = bench_of(model)[0].run(
        request(prompt, stopping=ends, adapter=adapter), request(prompt, adapter=missing)
    )
    assert answered.tokens[0] == alone[: alone.index(alone[4]) + 1]
    assert failed.failure is not None
    assert failed.failure.reason == "CORRUPT_ARTIFACT"
