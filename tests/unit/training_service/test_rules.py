"""Rules that need no database: retries, what fits, specifications there and back, tokens as the runner makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.rpc.training_kit import job_spec, save_tiny_model, talk

from slipstream_server.errors import OutOfMemory
from slipstream_server.models.facts import read_facts
from slipstream_server.rpc.training.specs import spec_message, spec_of
from slipstream_server.training.examples import make_example
from slipstream_server.training.model_tokenizer import ModelTokenizer
from slipstream_server.training.resources import Problem
from slipstream_server.training.retries import retry_after
from slipstream_server.training.rows import ConversationRow, Message
from slipstream_server.training.specification import RetryPolicy
from slipstream_server.training.supervisor import check_can_ever_fit


def test_waits_double_up_to_an_hour() -> None:
    policy = RetryPolicy(max_retries=10, initial_backoff_s=5)
    died = Problem(reason="WORKER_DIED", message="")
    assert [retry_after(policy, number, died) for number in range(3)] == [5, 10, 20]
    assert RetryPolicy(initial_backoff_s=1000).backoff_s(5) == 3600
    assert retry_after(policy, 10, died) is None


@pytest.mark.parametrize("reason", ["INVALID_FIELD", "INVALID_DATASET", "MODEL_LOAD_FAILED", "OUT_OF_MEMORY"])
def test_what_would_fail_again_is_not_tried_again(reason: str) -> None:
    assert retry_after(RetryPolicy(), 0, Problem(reason=reason, message="")) is None


def test_what_no_device_can_hold_is_refused_with_the_numbers() -> None:
    capacity = {"cpu": 100, "cuda:0": 40, "cuda:1": 20}
    check_can_ever_fit("cpu", 2, 50, capacity)
    check_can_ever_fit("cuda", 2, 20, capacity)
    for device, count, needed in (("cpu", 2, 51), ("cuda", 2, 21), ("cuda", 3, 1)):
        with pytest.raises(OutOfMemory) as caught:
            check_can_ever_fit(device, count, needed, capacity)
        assert int(caught.value.metadata["needed_bytes"]) > int(caught.value.metadata["capacity_bytes"])


def test_a_stored_specification_means_what_was_asked_for() -> None:
    asked = job_spec(publish="support", alias="candidate", priority=3, retries=4)
    asked.lora.rank, asked.lora.alpha, asked.lora.target_modules[:] = 4, 4.5, ["q_proj"]
    asked.hyperparameters.warmup_fraction = 0.25
    asked.publish.expected_alias_generation = 0
    asked.retry_policy.max_attempt_duration.seconds = 90
    spec = spec_of(asked)
    message = spec_message(spec)
    assert spec_of(message) == spec
    assert message.lora.alpha == 4.5
    assert message.publish.HasField("expected_alias_generation")
    assert message.retry_policy.max_attempt_duration.seconds == 90


@pytest.mark.slow
def test_tokens_and_masks_are_those_of_the_runner(tmp_path: Path) -> None:
    """The runner's tokenizer is transformers' own; the service's must make the same examples of the same rows."""
    from transformers import AutoTokenizer

    from slipstream_server.training.model import ModelTokenizer as RunnerTokenizer

    folder = save_tiny_model(tmp_path / "model")
    facts = read_facts(folder)
    theirs = RunnerTokenizer(AutoTokenizer.from_pretrained(folder), frozenset(facts.eos_token_ids))
    ours = ModelTokenizer.load(folder, facts)
    extra = [{"messages": [{"role": "system", "content": "Ü 日本"}, *talk(2)[1]["messages"], *talk(2)[0]["messages"]]}]
    for line, row in enumerate([*talk(5), *extra], start=1):
        messages = tuple(Message(role=each["role"], content=each["content"]) for each in row["messages"])
        parsed = ConversationRow(line=line, messages=messages)
        for length in (256, 24):
            assert make_example(parsed, ours, max_length=length) == make_example(parsed, theirs, max_length=length)
