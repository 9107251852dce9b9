"""Keyword arguments on the wire: unset stays unset, and nothing is dropped."""

import pytest

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import generation_pb2
from slipstream_client import options
from slipstream_client.errors import InvalidRequestError
from slipstream_client.requests import complete_request, count_tokens_request, generate_request
from slipstream_client.results import ChatMessage, ContentPart, Tool, ToolCall


def generate(prompt="Hi", **given):
    return generate_request(prompt, given, call="generate")


def test_nothing_given_is_nothing_sent():
    assert generate() == inference_pb2.GenerateRequest(text="Hi")
    assert generate(temperature=None, stop=None, priority=None) == inference_pb2.GenerateRequest(text="Hi")


def test_zero_and_false_are_sent():
    request = generate(temperature=0, do_sample=False, seed=0, skip_special_tokens=False)
    for name in ("temperature", "do_sample", "seed"):
        assert request.sampling.HasField(name)
    assert request.response.HasField("skip_special_tokens")
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("stopping")


def test_every_field_of_the_contract_has_its_argument():
    for message, names in (
        (generation_pb2.SamplingOptions, options.SamplingOptions),
        (generation_pb2.StoppingOptions, options.StoppingOptions),
        (generation_pb2.BeamOptions, options.BeamOptions),
    ):
        assert set(message.DESCRIPTOR.fields_by_name) == set(names.__annotations__)
    response = set(generation_pb2.ResponseOptions.DESCRIPTOR.fields_by_name)
    assert response == set(options.ResponseOptions.__annotations__) | {"logprobs"}


def test_everything_at_once():
    request = generate(
        model="m", adapter="support@live", temperature=0.7, top_k=5, logit_bias={3: -1.5}, stop="END",
        stop_token_ids=[9], max_new_tokens=4, ignore_eos=True, num_return_sequences=2, logprobs=3, echo=True,
        num_beams=4, length_penalty=0.5, priority="high", json_schema={"type": "object"}, add_special_tokens=False,
    )  # fmt: skip
    assert (request.model, request.adapter) == ("m", "support@live")
    assert (request.sampling.temperature, request.sampling.top_k, dict(request.sampling.logit_bias)) == (
        0.7,
        5,
        {3: -1.5},
    )
    assert (list(request.stopping.stop), list(request.stopping.stop_token_ids)) == (["END"], [9])
    assert (request.stopping.max_new_tokens, request.stopping.ignore_eos) == (4, True)
    assert (request.response.num_return_sequences, request.response.logprobs, request.response.echo) == (2, 3, True)
    assert (request.num_beams, request.beam.length_penalty) == (4, 0.5)
    assert request.priority == generation_pb2.PRIORITY_HIGH
    assert request.constraint.json_schema == '{"type": "object"}'
    assert request.HasField("add_special_tokens")
    assert not request.add_special_tokens


def test_prompts_of_each_kind():
    assert generate([1, 2]).token_ids.ids == [1, 2]
    chat = generate([{"role": "user", "content": "Hi"}], tools=[Tool(name="t")], continue_final_message=True).chat
    assert chat.messages[0].content == "Hi"
    assert chat.tools[0].name == "t"
    assert chat.continue_final_message
    assert count_tokens_request([ChatMessage(role="user", content="x")], {}).chat.messages[0].content == "x"


def test_parts_and_tool_calls():
    message = ChatMessage(role="user", parts=(ContentPart(text="look"), ContentPart(image=b"png")))
    call = ChatMessage(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments={"x": [1, "a"]}),))
    sent = complete_request([message, call], {}, call="complete").messages
    assert [part.WhichOneof("part") for part in sent[0].parts] == ["text", "image"]
    assert sent[1].tool_calls[0].arguments["x"][1] == "a"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"top_k": "many"}, "sampling.top_k"),
        ({"top_k": 2**63}, "sampling.top_k"),
        ({"max_new_tokens": 1.5}, "stopping.max_new_tokens"),
        ({"priority": "urgent"}, "priority"),
        ({"regex": "a", "grammar": "b"}, "constraint"),
        ({"tools": [Tool(name="t")]}, "tools"),
        ({"template_parameters": {"x": 1}}, "template_parameters"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(given, field):
    with pytest.raises(InvalidRequestError) as caught:
        generate(**given)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "contents": "x"}, "messages[0].contents"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": "user", "parts": [{}]}, "messages[0].parts[0]"),
        ("Hello", "messages[0]"),
    ],
)
def test_bad_messages_are_refused_by_their_place(message, field):
    with pytest.raises(InvalidRequestError) as caught:
        complete_request([message], {}, call="complete")
    assert caught.value.violations[0].field == field


def test_unknown_arguments_are_type_errors():
    with pytest.raises(TypeError, match="max_tokens"):
        generate(max_tokens=3)
