"""What the front says about constraints on its event loop: numbers of any size, and texts made to be slow to read."""

from __future__ import annotations

import json
import time
from typing import Literal

import pytest

from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.inference.constraint_rules import MAX_GRAMMAR_BYTES, check_constraint
from slipstream_server.inference.generation import Constraint

Kind = Literal["json_schema", "regex", "grammar"]

SLOW_TO_READ: dict[str, tuple[Kind, str]] = {
    "escaped quotes": ("grammar", 'start: "' + '\\"' * 32_000),
    "escaped slashes": ("grammar", "start: /" + "\\/" * 32_000),
    "angle brackets": ("grammar", "start: " + "<" * 65_000),
    "braced escapes": ("json_schema", json.dumps({"pattern": "\\p{" * 15_000})),
    "classes": ("json_schema", json.dumps({"pattern": "[" * 60_000})),
    "flags": ("json_schema", json.dumps({"pattern": "(?a" * 20_000})),
}


@pytest.mark.parametrize(("kind", "text"), SLOW_TO_READ.values(), ids=SLOW_TO_READ)
def test_nothing_takes_longer_to_judge_than_its_size_explains(kind: Kind, text: str) -> None:
    assert len(text) <= MAX_GRAMMAR_BYTES
    started_s = time.thread_time()
    check_constraint(Constraint(kind=kind, text=text))
    assert time.thread_time() - started_s < 0.6


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", json.dumps({"pattern": "a{" + "9" * 5_000 + "}"})),
        ("json_schema", json.dumps({"patternProperties": {"a{1," + "9" * 5_000 + "}": {}}})),
        ("grammar", "start: /a{" + "9" * 5_000 + "}/"),
        ("json_schema", '{"multipleOf": 1e999}'),
        ("json_schema", '{"multipleOf": ' + "9" * 5_000 + "}"),
    ],
)
def test_numbers_that_python_does_not_read_are_refused_by_field(kind: Kind, text: str) -> None:
    with pytest.raises(InvalidField, match=f"constraint.{kind}"):
        check_constraint(Constraint(kind=kind, text=text))


def test_leading_zeros_are_no_size() -> None:
    check_constraint(Constraint(kind="regex", text="a{" + "0" * 3_000 + "2}"))


@pytest.mark.parametrize("text", ['start: "a" <special>', 'start: "<a" <<b>', "start: @other", "start: %json {}"])
def test_what_a_grammar_may_not_name_is_found_behind_its_texts(text: str) -> None:
    with pytest.raises(UnsupportedField):
        check_constraint(Constraint(kind="grammar", text=text))


def test_what_stands_in_texts_and_comments_is_free() -> None:
    check_constraint(Constraint(kind="grammar", text='start: "<a> @b %json" | /<c>\\/@d/ // <e>'))
