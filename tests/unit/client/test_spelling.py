"""Plain values as messages: what a line of JSON can say, and what is refused by its path."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slipstream.inference.v1 import tasks_pb2
from slipstream_client.errors import InvalidRequestError
from slipstream_client.tasks import input_message

# "iVBORw==" is the base64 of the first four bytes of every PNG file (RFC 2083, section 12.11).
PNG, PNG_BASE64 = b"\x89PNG", "iVBORw=="


def read(line: str) -> tasks_pb2.TaskInput:
    return input_message(json.loads(line), "inputs[0]")


def test_a_line_of_json_holds_pictures_in_base64() -> None:
    assert read(f'{{"image": "{PNG_BASE64}"}}').image.data == PNG
    pair = read(f'{{"image_pair": {{"first": {{"data": "{PNG_BASE64}"}}, "second": {{"data": "{PNG_BASE64}"}}}}}}')
    assert (pair.image_pair.first.data, pair.image_pair.second.data) == (PNG, PNG)


def test_words_of_enums_and_pictures_are_read_in_lists_and_mappings_too() -> None:
    question = {"name": "late", "instructions": "Is it late?", "type": "yes_no"}
    decision = {"questions": [question], "assets": {"clock": {"data": PNG_BASE64}}}
    message = read(json.dumps({"decision": decision})).decision
    assert message.questions[0].type == tasks_pb2.DECISION_QUESTION_TYPE_YES_NO
    assert message.assets["clock"].data == PNG


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"image": "%%"}, r"image\.data"),
        ({"words": {"words": "abc"}}, r"words\.words"),
        ({"decision": {"questions": {"name": "late"}}}, r"decision\.questions"),
        ({"decision": {"questions": [{"nam": "late"}]}}, r"decision\.questions\[0\]\.nam"),
        ({"decision": {"questions": [{"type": "maybe"}]}}, r"decision\.questions\[0\]\.type"),
        ({"decision": {"assets": {"clock": "late"}}}, r"decision\.assets\.clock"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"inputs\[0\]\.{field}"):
        input_message(given, "inputs[0]")
