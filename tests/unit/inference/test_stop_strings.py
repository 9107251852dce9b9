"""Stop strings against the plain definition, however the text is cut."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.errors import InvalidField
from slipstream_server.inference.stop_strings import StopAutomaton, StopScanner, check_stop_strings


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The match complete first, of those the longest; the text before it."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


def scan(chunks: list[str], stops: list[str]) -> tuple[str, str | None, list[str]]:
    scanner, parts = StopScanner(StopAutomaton(stops)), []
    for chunk in chunks:
        found = scanner.push(chunk)
        parts.append(found.text)
        if found.matched is not None:
            return "".join(parts), found.matched, parts
    return "".join(parts) + scanner.finish(), None, parts


letters = st.text(alphabet="ab🙂", max_size=30)


@given(
    text=letters,
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), min_size=1, max_size=6),
    data=st.data(),
)
def test_equals_the_definition_for_any_chunking(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(edges)]
    released, matched, _ = scan(chunks, stops)
    assert (released, matched) == by_definition(text, stops)


@given(text=letters, stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=6))
def test_holds_back_exactly_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    before, matched = by_definition(text, stops)
    if matched is not None:
        return
    released = StopScanner(StopAutomaton(stops)).push(text).text
    held = text[len(released) :]
    longest = max(
        (n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stops)), default=0
    )
    assert len(held) == longest
    assert before == text


def test_nothing_is_released_beyond_a_possible_start() -> None:
    assert scan(["Hel", "lo ST", "O", "P now"], ["STOP"])[2] == ["Hel", "lo ", "", ""]
    assert scan(["Hel", "lo ST", "O", " now"], ["STOP"])[2] == ["Hel", "lo ", "", "STO now"]


def test_many_long_stop_strings_cost_linear_time() -> None:
    stops = ["a" * 255 + chr(ord("b") + place) for place in range(16)]
    scanner = StopScanner(StopAutomaton(stops))
    started_s = time.monotonic()
    for _ in range(20_000):
        assert scanner.push("a" * 10).matched is None
    assert time.monotonic() - started_s < 5.0


@pytest.mark.parametrize("stops", [["x"] * 17, [""], ["x" * 257], ["ok", ""]])
def test_too_many_too_long_and_empty_ones_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidField, match=r"stopping\.stop"):
        check_stop_strings(stops)


def test_a_million_stop_strings_are_refused_at_once() -> None:
    stops = ["x"] * 1_000_000
    started_s = time.monotonic()
    with pytest.raises(InvalidField, match="1000000 strings; at most 16"):
        check_stop_strings(stops)
    assert time.monotonic() - started_s < 0.05
