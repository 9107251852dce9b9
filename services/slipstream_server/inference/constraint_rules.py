"""What a constraint may be, said before anything is compiled: sizes, nesting, and how far repetitions multiply.

The compiler behind it refuses what it cannot enforce; these bounds keep what it is given small, so that one request
cannot occupy it. Torch-free and pure; the front asks on its event loop, so the work grows with the size alone: no
pattern here may scan the rest of the text from each of its places. What is not closed counts up to where it ends; the
compiler refuses it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.inference.generation import Constraint

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_NESTING = 64
MAX_ENUM_VALUES = 4096
MAX_MULTIPLE_OF_DIGITS = 10_000
MAX_COMMON_MULTIPLE = 50_000
MAX_JOINED_PATTERNS = 12
MAX_REGEX_BYTES = 4 * 1024
MAX_REGEX_POSITIONS = 65_536
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 1024
MAX_GRAMMAR_BYTES = 64 * 1024

_REPETITION = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")
_BRACED_ESCAPE = re.compile(r"\\[pPxuU]\{[^{}]*\}")
_VERBOSE_FLAG = re.compile(r"\(\?[a-wyzA-Z]*x")
_GRAMMAR_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"?|/(?:\\.|[^/\\\n])+/?[a-z]*|//[^\n]*|\#[^\n]*')
_INTERSECTION = re.compile(r"&|~(?!\s*[0-9])")
_MAX_SCHEMA_STEPS = 100
_NAMED = ("properties", "patternProperties")
_PLACES = (*_NAMED, "items", "prefixItems", "additionalItems", "additionalProperties")
_GRAMMAR_REFUSED = re.compile(r"%(?!ignore\b|import\b)\w+|<[^<>\n]*>|@\w+|\b(?:temperature|max_tokens|stop|suffix)\b")


def check_constraint(constraint: Constraint) -> None:
    """Raise InvalidField or UnsupportedField, naming the field as the contract does."""
    match constraint.kind:
        case "json_schema":
            _check_schema(constraint.text)
        case "regex":
            _check_size("constraint.regex", constraint.text, MAX_REGEX_BYTES)
            check_pattern("constraint.regex", constraint.text)
        case "choice":
            _check_choices(constraint.choices)
        case "grammar":
            _check_grammar(constraint.text)


def check_pattern(field: str, pattern: str) -> None:
    """Refuse a pattern whose repetitions, written out, have too many positions; and verbose mode."""
    if _VERBOSE_FLAG.search(pattern):
        raise UnsupportedField.of(field, "the flag x (verbose) is not available; write the pattern without it")
    if _num_positions(pattern) > MAX_REGEX_POSITIONS:
        raise InvalidField.of(
            field, f"its repetitions, written out, have more than {MAX_REGEX_POSITIONS} positions; use smaller ones"
        )


def parse_schema(text: str) -> Any:
    """The schema as plain Python."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise InvalidField.of("constraint.json_schema", f"is nested deeper than {MAX_SCHEMA_NESTING} levels") from None
    except ValueError as error:
        raise InvalidField.of("constraint.json_schema", f"is not JSON: {str(error)[:120]}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any number it could be compared with")
    return value


def _check_schema(text: str) -> None:
    field = "constraint.json_schema"
    _check_size(field, text, MAX_SCHEMA_BYTES)
    schema = parse_schema(text)
    if not isinstance(schema, dict | bool):
        raise InvalidField.of(field, f"is a {type(schema).__name__}; a schema is a JSON object or a boolean")
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise UnsupportedField.of(field, "x-guidance is not a keyword of JSON Schema; remove it")
    num_values = num_steps = 0
    common_multiple = 1
    for level, key, value in _walk(schema):
        if level > MAX_SCHEMA_NESTING:
            raise InvalidField.of(field, f"is nested deeper than {MAX_SCHEMA_NESTING} levels")
        if key == "enum" and isinstance(value, list):
            num_values += len(value)
        elif key == "multipleOf" and isinstance(value, int | float):
            num_steps += _significand(value)
            common_multiple = min(math.lcm(common_multiple, _significand(value) or 1), MAX_COMMON_MULTIPLE + 1)
        elif key == "pattern" and isinstance(value, str):
            check_pattern(field, value)
        elif key == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                check_pattern(field, pattern)
    if num_values > MAX_ENUM_VALUES:
        raise InvalidField.of(field, f"its enums have {num_values} values; at most {MAX_ENUM_VALUES} together")
    if num_steps > MAX_MULTIPLE_OF_DIGITS:
        raise InvalidField.of(
            field, f"its multipleOf, without decimal points, add up to {num_steps}; at most {MAX_MULTIPLE_OF_DIGITS}"
        )
    if common_multiple > MAX_COMMON_MULTIPLE:
        text = f"the least common multiple of its multipleOf, without decimal points, exceeds {MAX_COMMON_MULTIPLE}"
        raise InvalidField.of(field, text)
    if _num_joined(schema) > MAX_JOINED_PATTERNS:
        text = f"lays more than {MAX_JOINED_PATTERNS} patterns and formats on one value together (allOf, $ref)"
        raise InvalidField.of(field, text)


def _walk(schema: Any) -> Iterator[tuple[int, str, Any]]:
    """Every value with its depth and the key it stands under; without recursion."""
    pending: list[tuple[int, str, Any]] = [(0, "", schema)]
    while pending:
        level, key, value = pending.pop()
        yield level, key, value
        if isinstance(value, dict):
            pending += [(level + 1, name, item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(level + 1, "", item) for item in value]


def _num_joined(schema: Any) -> int:
    """How many patterns and formats one value may have to match at once, at most: the compiler's work and memory double
    with each of them.
    """
    every = sum(key in ("pattern", "format") for _, key, _ in _walk(schema))
    known: dict[int, int] = {}

    def joined(node: Any, steps: int) -> int:
        if not isinstance(node, dict):
            return 0
        if steps > _MAX_SCHEMA_STEPS:
            return every
        if id(node) not in known:
            known[id(node)] = 0  # what refers to itself adds nothing
            known[id(node)] = count(node, steps + 1)
        return known[id(node)]

    def count(node: dict[str, Any], steps: int) -> int:
        own = sum(isinstance(node.get(key), str) for key in ("pattern", "format"))
        own += sum(joined(part, steps) for part in _parts(node, "allOf"))
        for names in (("anyOf",), ("oneOf",), _PLACES):
            own += max((joined(part, steps) for name in names for part in _parts(node, name)), default=0)
        if isinstance(reference := node.get("$ref"), str):
            found, target = _referred(schema, reference)
            own += joined(target, steps) if found else every
        return own

    return joined(schema, 0)


def _parts(node: dict[str, Any], name: str) -> list[Any]:
    """The schemas under a keyword: one, a list of them, or named ones."""
    value = node.get(name)
    if isinstance(value, list):
        return value
    return list(value.values()) if isinstance(value, dict) and name in _NAMED else [value]


def _referred(schema: Any, reference: str) -> tuple[bool, Any]:
    """What a pointer within the schema points to, if it is one and points anywhere."""
    target = schema
    if not reference.startswith("#"):
        return False, None
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(target, dict) or name not in target:
            return False, None
        target = target[name]
    return reference == "#" or "/" in reference, target


def _significand(value: float) -> int:
    """The digits of a number as a whole number, zeros at its ends left out: 0.25 is 25."""
    digits = re.sub(r"e.*", "", repr(value)).replace(".", "").strip("-0")
    return int(digits[:18] or "0")


def _check_choices(choices: tuple[str, ...]) -> None:
    field = "constraint.choice.choices"
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidField.of(field, f"has {len(choices)} texts; 1 to {MAX_CHOICES} are allowed")
    for place, choice in enumerate(choices):
        if not 1 <= len(choice) <= MAX_CHOICE_CHARS:
            raise InvalidField.of(f"{field}[{place}]", f"has {len(choice)} characters; 1 to {MAX_CHOICE_CHARS}")


def _check_grammar(text: str) -> None:
    field = "constraint.grammar"
    _check_size(field, text, MAX_GRAMMAR_BYTES)
    for literal in _GRAMMAR_TEXT.findall(text):
        if literal.startswith("/") and not literal.startswith("//"):
            check_pattern(field, literal)
    bare = _GRAMMAR_TEXT.sub(" ", text)
    if len(_INTERSECTION.findall(bare)) >= MAX_JOINED_PATTERNS:
        raise InvalidField.of(
            field, f"has {MAX_JOINED_PATTERNS} or more intersections (&) and negations (~); use fewer"
        )
    if found := _GRAMMAR_REFUSED.search(bare):
        raise UnsupportedField.of(field, f"{found[0][:40]!r} is not available; use rules, terminals and %ignore")


def _check_size(field: str, text: str, most_bytes: int) -> None:
    size = len(text.encode())
    if not 1 <= size <= most_bytes:
        raise InvalidField.of(field, f"has {size} bytes; 1 to {most_bytes} are allowed")


def _num_positions(pattern: str) -> int:
    """Characters and classes of the pattern with its repetitions written out; more than the limit counts as one over
    it.
    """
    groups, last, place = [0], 0, 0
    while place < len(pattern):
        char = pattern[place]
        repetition = _REPETITION.match(pattern, place)
        if repetition is not None:
            times = max(1, _bounded(repetition[1]), _bounded(repetition[2] or ""))
            groups[-1] += last * (times - 1)
            last *= times
            place = repetition.end()
        elif char == "(":
            groups.append(0)
            place += 1
        elif char == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
            place += 1
        elif char in "*+?|":
            place += 1
        else:
            last = 1
            groups[-1] += 1
            place = _after_atom(pattern, place)
        if last > MAX_REGEX_POSITIONS or groups[-1] > MAX_REGEX_POSITIONS:
            return MAX_REGEX_POSITIONS + 1
    return sum(groups)


def _bounded(digits: str) -> int:
    """The number, or another one that is over the limit too: it may have more digits than Python reads."""
    return int(digits.lstrip("0")[:6] or "0")


def _after_atom(pattern: str, place: int) -> int:
    """Where the class, escape or character at ``place`` ends."""
    if pattern[place] == "\\":
        braced = _BRACED_ESCAPE.match(pattern, place)
        return braced.end() if braced else place + 2
    if pattern[place] != "[":
        return place + 1
    depth = 0
    while place < len(pattern):
        char = pattern[place]
        depth += {"[": 1, "]": -1}.get(char, 0)
        place += 2 if char == "\\" else 1
        if depth == 0:
            break
    return place
