"""One sequence: what belongs to it, where its text ends, and why."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from slipstream_server.inference.completion import SequenceText, position_logprobs
from slipstream_server.inference.detokenizer import DetokenizerFactory
from slipstream_server.inference.generation import TopLogprobs
from slipstream_server.inference.stop_strings import StopAutomaton
from slipstream_server.models.tokenizer import TextTokenizer

END = 1


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer.load(tokenizer_folder)


def sequence(
    tokenizer: TextTokenizer, *stops: str, include_stop: bool = False, skip_special_tokens: bool = True
) -> SequenceText:
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=skip_special_tokens)
    return SequenceText(detokenizer, StopAutomaton(stops) if stops else None, include_stop=include_stop)


def letters(tokenizer: TextTokenizer, text: str) -> list[int]:
    """One token for each byte of ``text``."""
    ids = [tokenizer.backend.token_to_id(char) for char in text.replace(" ", "Ġ")]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def test_text_held_back_for_a_stop_string_comes_with_the_end(tokenizer: TextTokenizer) -> None:
    ids = letters(tokenizer, "hi STO")
    piece = sequence(tokenizer, "STOP").push(ids, "length")
    assert (piece.text, piece.num_tokens, piece.finish_reason) == ("hi STO", 6, "length")


def test_an_incomplete_character_shows_at_the_end_only(tokenizer: TextTokenizer) -> None:
    first_byte = tokenizer.backend.token_to_id("ð")
    assert first_byte is not None
    running = sequence(tokenizer)
    assert running.push([first_byte], None).text == ""
    assert running.push([END], "eos_token").text == "\ufffd"


def test_tokens_behind_the_stop_string_are_dropped(tokenizer: TextTokenizer) -> None:
    piece = sequence(tokenizer, "c").push(letters(tokenizer, "abcde"), "length")
    assert (piece.text, piece.num_tokens, piece.finish_reason, piece.matched_stop) == ("ab", 3, "stop_string", "c")


@pytest.mark.parametrize(("include_stop", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_shows_only_when_asked_for(tokenizer: TextTokenizer, include_stop: bool, text: str) -> None:
    running = sequence(tokenizer, include_stop=include_stop)
    piece = running.push(letters(tokenizer, "abc"), "stop_token")
    assert (piece.text, piece.num_tokens, piece.finish_reason) == (text, 3, "stop_token")
    assert running.finish_reason == "stop_token"


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "ab</s>")])
def test_the_end_token_shows_with_the_other_special_tokens(tokenizer: TextTokenizer, skip: bool, text: str) -> None:
    piece = sequence(tokenizer, skip_special_tokens=skip).push([*letters(tokenizer, "ab"), END], "eos_token")
    assert (piece.text, piece.num_tokens) == (text, 3)


def test_logprobs_are_spelled_and_a_missing_one_is_zero(tokenizer: TextTokenizer) -> None:
    spelled = DetokenizerFactory(tokenizer)
    a, b = letters(tokenizer, "ab")
    first = position_logprobs(a, TopLogprobs(math.nan, [], []), spelled)
    assert first.chosen is not None
    assert (first.chosen.token, first.chosen.logprob, first.top) == ("a", 0.0, ())
    found = position_logprobs(a, TopLogprobs(-1.0, [b, a], [-0.5, -1.0]), spelled)
    assert [(top.token, top.logprob) for top in found.top] == [("b", -0.5), ("a", -1.0)]
