"""Bad input through a stock client that knows only the address: each has its own typed error, and no answer leaks.

Expected codes, reasons and fields are written here by hand, from the contract.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from e2e.conftest import CONTEXT_TOKENS, Services
from e2e.stranger import (
    COMPLETE,
    GENERATE,
    STREAM_COMPLETE,
    STREAM_GENERATE,
    STREAM_MESSAGE,
    Refusal,
    Stranger,
    refusal_of,
    stranger,
)

CHAT_SERVICE = "slipstream.chat.v1.ChatService"
INFERENCE_SERVICE = "slipstream.inference.v1.InferenceService"
INVALID, UNSUPPORTED, TOO_LONG = "INVALID_FIELD", "UNSUPPORTED_FIELD", "PROMPT_TOO_LONG"
USER = {"role": "ROLE_USER", "content": "hello"}
MANY = 10**6
HUGE = 2**63 - 1
BEAMS = {"num_beams": 2}


def sampling(**options: Any) -> dict[str, Any]:
    return {"sampling": {"do_sample": True, **options}}


def stopping(**options: Any) -> dict[str, Any]:
    return {"stopping": options}


def sequences(count: int) -> dict[str, Any]:
    return {"text": "a", "response": {"num_return_sequences": count}}


def told(refusal: Refusal) -> tuple[str, str, tuple[str, ...]]:
    """What a client's code can switch on; the rest is checked to be fit for strangers."""
    assert refusal.domain == "slipstream"
    for secret in ("Traceback", 'File "', "site-packages", "/tmp", str(Path.home()), "slipstream_server"):
        assert secret not in refusal.text, refusal
    return refusal.code, refusal.reason, refusal.fields


# What both services have, by the field's name in GenerateRequest; chat has it below `options`.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "max_new_tokens 0": (stopping(max_new_tokens=0), "stopping.max_new_tokens"),
    "max_new_tokens -1": (stopping(max_new_tokens=-1), "stopping.max_new_tokens"),
    "max_new_tokens 2^31": (stopping(max_new_tokens=2**31), "stopping.max_new_tokens"),
    "max_new_tokens 2^63-1": (stopping(max_new_tokens=HUGE), "stopping.max_new_tokens"),
    "min_new_tokens -1": (stopping(min_new_tokens=-1), "stopping.min_new_tokens"),
    "min_new_tokens above max": (stopping(min_new_tokens=5, max_new_tokens=4), "stopping.min_new_tokens"),
    "10^6 stop strings": (stopping(stop=["x"] * MANY), "stopping.stop"),
    "empty stop string": (stopping(stop=["ok", ""]), "stopping.stop[1]"),
    "NUL in a stop string": (stopping(stop=["a\0b"]), "stopping.stop[0]"),
    "a stop string of 1 MB": (stopping(stop=["a" * MANY]), "stopping.stop[0]"),
    "10^6 stop tokens": (stopping(stop_token_ids=[5] * MANY), "stopping.stop_token_ids"),
    "unknown stop token": (stopping(stop_token_ids=[400]), "stopping.stop_token_ids"),
    "temperature NaN": (sampling(temperature="NaN"), "sampling.temperature"),
    "temperature -1": (sampling(temperature=-1), "sampling.temperature"),
    "temperature inf": (sampling(temperature="Infinity"), "sampling.temperature"),
    "temperature without sampling": ({"sampling": {"temperature": 0.5}}, "sampling.temperature"),
    "top_p 0": (sampling(top_p=0), "sampling.top_p"),
    "top_p 1.1": (sampling(top_p=1.1), "sampling.top_p"),
    "top_k -1": (sampling(top_k=-1), "sampling.top_k"),
    "top_k 2^31": (sampling(top_k=2**31), "sampling.top_k"),
    "min_p NaN": (sampling(min_p="NaN"), "sampling.min_p"),
    "typical_p 0": (sampling(typical_p=0), "sampling.typical_p"),
    "repetition_penalty 0": (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    "presence_penalty -inf": (sampling(presence_penalty="-Infinity"), "sampling.presence_penalty"),
    "frequency_penalty 3": (sampling(frequency_penalty=3), "sampling.frequency_penalty"),
    "seed -1": (sampling(seed=-1), "sampling.seed"),
    "logit_bias of no token": (sampling(logit_bias={"400": 1.0}), "sampling.logit_bias"),
    "logit_bias of token -1": (sampling(logit_bias={"-1": 1.0}), "sampling.logit_bias"),
    "logit_bias NaN": (sampling(logit_bias={"7": "NaN"}), "sampling.logit_bias[7]"),
    "priority 99": ({"priority": 99}, "priority"),
}


@pytest.mark.parametrize(("options", "field"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_generation(inference: Stranger, options: dict[str, Any], field: str) -> None:
    request = inference.encode(GENERATE, {"text": "hello", **options})
    for method in (GENERATE, STREAM_GENERATE):
        assert told(inference.refusal(method, request)) == ("INVALID_ARGUMENT", INVALID, (field,))


@pytest.mark.parametrize(("options", "field"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_a_chat_are_named_as_the_chat_names_them(
    chat: Stranger, options: dict[str, Any], field: str
) -> None:
    request = chat.encode(COMPLETE, {"messages": [USER], "options": options})
    for method in (COMPLETE, STREAM_COMPLETE):
        assert told(chat.refusal(method, request)) == ("INVALID_ARGUMENT", INVALID, (f"options.{field}",))


PROMPTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({}, INVALID, "prompt"),
    "empty text": ({"text": ""}, INVALID, "text"),
    "NUL in text": ({"text": "a\0b"}, INVALID, "text"),
    "10 MB of text": ({"text": "a " * (5 * MANY)}, INVALID, "text"),
    "text over the context": ({"text": "☃" * CONTEXT_TOKENS}, TOO_LONG, "text"),
    "1 MB of text": ({"text": "a" * MANY}, TOO_LONG, "text"),
    "text and answer over the context": (
        {"text": "☃☃", **stopping(max_new_tokens=CONTEXT_TOKENS)},
        TOO_LONG,
        "stopping.max_new_tokens",
    ),
    "no token ids": ({"token_ids": {}}, INVALID, "token_ids.ids"),
    "unknown token id": ({"token_ids": {"ids": [5, 400]}}, INVALID, "token_ids.ids[1]"),
    "negative token id": ({"token_ids": {"ids": [-1]}}, INVALID, "token_ids.ids[0]"),
    "token ids over the context": ({"token_ids": {"ids": [5] * CONTEXT_TOKENS}}, TOO_LONG, "token_ids.ids"),
    "special tokens for ids": ({"token_ids": {"ids": [5]}, "add_special_tokens": True}, INVALID, "add_special_tokens"),
    "num_return_sequences 0": (sequences(0), INVALID, "response.num_return_sequences"),
    "num_return_sequences 10^6": (sequences(MANY), INVALID, "response.num_return_sequences"),
    "equal greedy sequences": (sequences(2), INVALID, "response.num_return_sequences"),
    "logprobs 21": ({"text": "a", "response": {"logprobs": 21}}, INVALID, "response.logprobs"),
    "prompt_logprobs -1": ({"text": "a", "response": {"prompt_logprobs": -1}}, INVALID, "response.prompt_logprobs"),
    "num_beams 2^31-1": ({"text": "a", "num_beams": 2**31 - 1}, INVALID, "num_beams"),
    "length_penalty NaN": ({"text": "a", **BEAMS, "beam": {"length_penalty": "NaN"}}, INVALID, "beam.length_penalty"),
    "repetitions of repetitions": (
        {"text": "a", "constraint": {"regex": "(a{1000}){1000}"}},
        INVALID,
        "constraint.regex",
    ),
    "10^5 enum values": (
        {"text": "a", "constraint": {"json_schema": json.dumps({"enum": list(range(100_000))})}},
        INVALID,
        "constraint.json_schema",
    ),
    "no keyword of JSON Schema": (
        {"text": "a", "constraint": {"json_schema": '{"x-guidance": {}}'}},
        UNSUPPORTED,
        "constraint.json_schema",
    ),
    "an empty constraint": ({"text": "a", "constraint": {}}, INVALID, "constraint"),
    "model ../x": ({"text": "a", "model": "../x"}, INVALID, "model"),
    "model /etc/passwd": ({"text": "a", "model": "/etc/passwd"}, INVALID, "model"),
    "model with NUL": ({"text": "a", "model": "a\0b"}, INVALID, "model"),
    "model ..%2f": ({"text": "a", "model": "..%2f"}, INVALID, "model"),
    "model of 4 KB": ({"text": "a", "model": "m" * 4096}, INVALID, "model"),
    "model in look-alike letters": ({"text": "a", "model": "tіny"}, INVALID, "model"),
    "models/ and nothing": ({"text": "a", "model": "models/"}, INVALID, "model"),
    "models/../x": ({"text": "a", "model": "models/../x"}, INVALID, "model"),
}


@pytest.mark.parametrize(("request_", "reason", "field"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_and_names_of_a_generation(
    inference: Stranger, request_: dict[str, Any], reason: str, field: str
) -> None:
    for method in (GENERATE, STREAM_GENERATE):
        assert told(inference.refusal(method, request_)) == ("INVALID_ARGUMENT", reason, (field,))


def test_a_prompt_too_long_says_the_numbers(inference: Stranger) -> None:
    refusal = inference.refusal(GENERATE, {"token_ids": {"ids": [5] * (CONTEXT_TOKENS + 1)}})
    assert refusal.metadata == {"prompt_tokens": str(CONTEXT_TOKENS + 1), "context_tokens": str(CONTEXT_TOKENS)}


def test_an_unknown_model_is_not_found(inference: Stranger, chat: Stranger) -> None:
    for refusal in (
        inference.refusal(GENERATE, {"text": "a", "model": "nobody"}),
        chat.refusal(COMPLETE, {"messages": [USER], "model": "models/nobody"}),
    ):
        assert told(refusal) == ("NOT_FOUND", "MODEL_NOT_FOUND", ())
        assert refusal.metadata == {"model": "nobody"}


PART = {"role": "ROLE_USER", "parts": [{"text": "a\0"}]}
IMAGE = {"role": "ROLE_USER", "parts": [{"image": "AAAA"}]}
CALLS = {**USER, "tool_calls": [{"name": "f"}]}
MESSAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, INVALID, "messages"),
    "5,000 messages": ({"messages": [USER] * 5000}, INVALID, "messages"),
    "unset role": ({"messages": [USER, {"content": "a"}]}, INVALID, "messages[1].role"),
    "role 99": ({"messages": [{"role": 99, "content": "a"}]}, INVALID, "messages[0].role"),
    "no content": ({"messages": [{"role": "ROLE_USER"}]}, INVALID, "messages[0].content"),
    "NUL": ({"messages": [{"role": "ROLE_USER", "content": "a\0"}]}, INVALID, "messages[0].content"),
    "NUL in a part": ({"messages": [PART]}, INVALID, "messages[0].content"),
    "content and parts": ({"messages": [{**USER, "parts": [{"text": "a"}]}]}, INVALID, "messages[0].parts"),
    "an image": ({"messages": [IMAGE]}, UNSUPPORTED, "messages[0].parts[0].image"),
    "tool calls of a user": ({"messages": [CALLS]}, INVALID, "messages[0].tool_calls"),
    "15 MB": ({"messages": [{"role": "ROLE_USER", "content": "a" * (15 * MANY)}]}, INVALID, "messages[0].content"),
    "over the context": ({"messages": [{"role": "ROLE_USER", "content": "☃" * CONTEXT_TOKENS}]}, TOO_LONG, "messages"),
    "200 tools": ({"messages": [USER], "options": {"tools": [{"name": "f"}] * 200}}, INVALID, "options.tools"),
    "messages as a template parameter": (
        {"messages": [USER], "options": {"template_parameters": {"messages": []}}},
        INVALID,
        "options.template_parameters.messages",
    ),
    "eos_token as a template parameter": (
        {"messages": [USER], "options": {"template_parameters": {"eos_token": ""}}},
        INVALID,
        "options.template_parameters.eos_token",
    ),
    "constraint": (
        {"messages": [USER], "options": {"constraint": {"regex": "(a{999}){999}"}}},
        INVALID,
        "options.constraint.regex",
    ),
    "logprobs 21": ({"messages": [USER], "options": {"logprobs": 21}}, INVALID, "options.logprobs"),
    "model ../x": ({"messages": [USER], "model": "../x"}, INVALID, "model"),
}


@pytest.mark.parametrize(("request_", "reason", "field"), MESSAGES.values(), ids=MESSAGES)
def test_messages_of_a_chat(chat: Stranger, request_: dict[str, Any], reason: str, field: str) -> None:
    for method in (COMPLETE, STREAM_COMPLETE):
        assert told(chat.refusal(method, request_)) == ("INVALID_ARGUMENT", reason, (field,))


TURNS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unset role": ({"message": {"content": "a"}}, INVALID, "message.role"),
    "an assistant's message": ({"message": {"role": "ROLE_ASSISTANT", "content": "a"}}, INVALID, "message.role"),
    "no content": ({"message": {"role": "ROLE_USER"}}, INVALID, "message.content"),
    "NUL": ({"message": {"role": "ROLE_USER", "content": "a\0"}}, INVALID, "message.content"),
    "NUL in a part": ({"message": PART}, INVALID, "message.content"),
    "NUL in the name": ({"message": {**USER, "name": "a\0"}}, INVALID, "message.name"),
    "over the context": ({"message": {"role": "ROLE_USER", "content": "☃" * CONTEXT_TOKENS}}, TOO_LONG, "message"),
    "temperature -1": ({"message": USER, "options": sampling(temperature=-1)}, INVALID, "options.sampling.temperature"),
    "request_id of 4 KB": ({"message": USER, "request_id": "r" * 4096}, INVALID, "request_id"),
    "parent ../x": ({"message": USER, "parent": "conversations/../x"}, INVALID, "parent"),
}


@pytest.fixture
def conversation(chat: Stranger) -> str:
    name: str = chat.call(f"{CHAT_SERVICE}/CreateConversation", {}).name
    return name


@pytest.mark.parametrize(("request_", "reason", "field"), TURNS.values(), ids=TURNS)
def test_turns_of_a_conversation_that_are_refused_leave_no_trace(
    chat: Stranger, conversation: str, request_: dict[str, Any], reason: str, field: str
) -> None:
    turn = {"options": stopping(max_new_tokens=2)}
    chat.call(f"{CHAT_SERVICE}/SendMessage", {**turn, "parent": conversation, "message": USER})
    request = {"parent": conversation, **request_}
    assert told(chat.refusal(STREAM_MESSAGE, request)) == ("INVALID_ARGUMENT", reason, (field,))
    stored = chat.call(f"{CHAT_SERVICE}/ListMessages", {"parent": conversation}).messages
    assert [message.sequence for message in stored] == [1, 2]


def test_bytes_that_are_no_message_and_messages_too_large(inference: Stranger, chat: Stranger) -> None:
    for client, method, text in (
        (inference, GENERATE, inference.encode(GENERATE, {"text": "abcd"})),
        (inference, GENERATE, inference.encode(GENERATE, {"text": "a", "model": "abcd"})),
        (chat, COMPLETE, chat.encode(COMPLETE, {"messages": [{"role": "ROLE_USER", "content": "abcd"}]})),
    ):
        not_utf8 = text.replace(b"abcd", b"\xed\xa0\x80z")  # a lone surrogate
        for garbage in (b"\xff\xff\xff\xff", not_utf8):
            assert told(client.refusal(method, garbage)) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST", ("",))
        refusal = client.refusal(method, text.replace(b"abcd", b"a") + bytes(20 * MANY))
        assert told(refusal) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", ())
        assert refusal.retry_s is None


def test_methods_that_are_not_there(inference: Stranger) -> None:
    for method in (f"{INFERENCE_SERVICE}/Paint", "slipstream.inference.v9.InferenceService/Generate"):
        with pytest.raises(grpc.RpcError) as caught:
            inference.channel.unary_unary(f"/{method}")(b"", timeout=10)
        assert told(refusal_of(caught.value))[:2] == ("UNIMPLEMENTED", "METHOD_NOT_IMPLEMENTED")


def test_extremes_that_are_allowed(inference: Stranger) -> None:
    """-0 is 0, the largest seed is a seed, and equal stop strings are one."""
    for options in (
        sampling(temperature=-0.0),
        sampling(seed=HUGE, top_p=1e-320, top_k=2**31 - 1),
        {"stopping": {"stop": ["zz", "zz"], "max_new_tokens": CONTEXT_TOKENS - 1}},
    ):
        request = {"token_ids": {"ids": [7]}, **stopping(max_new_tokens=2), **options}
        assert inference.call(GENERATE, request).usage.prompt_tokens == 1


def test_a_stranger_finds_and_calls_everything(services: Services, inference: Stranger, chat: Stranger) -> None:
    assert {INFERENCE_SERVICE, "slipstream.inference.v1.ModelService", "grpc.health.v1.Health"} <= set(
        inference.services()
    )
    assert CHAT_SERVICE in chat.services()
    events = list(inference.stream(STREAM_GENERATE, {"text": "hello", **stopping(max_new_tokens=3)}))
    assert [event.WhichOneof("event") for event in events][:: len(events) - 1] == ["started", "finished"]
    grpcurl = Path(sys.executable).with_name("grpcurl")
    command = [
        grpcurl,
        "-plaintext",
        "-d",
        '{"text": "hello", "stopping": {"max_new_tokens": 2}}',
        services.inference.address,
    ]
    done = subprocess.run([*command, GENERATE], capture_output=True, text=True, timeout=60, check=True)
    assert '"completion_tokens": "2"' in done.stdout


def test_the_service_still_answers_after_all_that(services: Services) -> None:
    with stranger(services.inference.address) as client:
        assert client.call(GENERATE, {"text": "hello", **stopping(max_new_tokens=2)}).usage.completion_tokens == 2
    for running in (services.inference, services.chat):
        log = running.log.read_text()
        assert [line[:2000] for line in log.splitlines() if "Traceback" in line] == []
        assert "unforeseen" not in log
    assert services.inference.num_requests() == 0
    assert services.inference.metric("slipstream_worker_restarts_total") == 0
