"""Examples: which tokens are learnt. A tokenizer of one token per character makes every expectation a hand count."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from slipstream_server.errors import InvalidRequest
from slipstream_server.training.examples import Example, make_example, text_pieces
from slipstream_server.training.rows import CompletionRow, ConversationRow, Message, Row, RowError, RowErrorReason

START, END, BEGIN = 1, 2, 3
SPECIAL = {"<start>": START, "<end>": END, "<begin>": BEGIN}


@dataclass(frozen=True)
class CharacterTokenizer:
    """One id per character; the three special tokens are one each. ``style`` picks a chat template."""

    style: str = "chatml"
    eos_token_id: int | None = END

    @property
    def has_chat_template(self) -> bool:
        return self.style != "none"

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset() if self.eos_token_id is None else frozenset([self.eos_token_id])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [SPECIAL.get(part) or ord(part) for part in re.findall(r"<start>|<end>|<begin>|.", text, re.DOTALL)]
        return [BEGIN, *ids] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        names = {token_id: name for name, token_id in SPECIAL.items()}
        return "".join(names.get(token_id) or chr(token_id) for token_id in token_ids)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        last = len(messages) - 1
        turns = [self._turn(message, place == last) for place, message in enumerate(messages)]
        return "".join(turns) + ("<start>A:" if add_generation_prompt else "")

    def _turn(self, message: Mapping[str, str], is_last: bool) -> str:
        content, initial = message["content"], message["role"][0].upper()
        if self.style == "strict" and message["role"] == "system":
            raise InvalidRequest("the model's template refuses the messages: no system role")
        if self.style == "last_thinks" and initial == "A" and is_last:
            return f"<start>A:~{content}<end>\n"
        if self.style == "forgetful" and initial == "A":
            return ""
        if self.style == "endless":
            return f"<start>{initial}:{content}\n"
        return f"<start>{initial}:{content}<end>\n"


def conversation(*turns: str) -> ConversationRow:
    """Turns as ``u:hello`` or ``a:hi``."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = tuple(Message(role=roles[turn[0]], content=turn[2:]) for turn in turns)
    return ConversationRow(line=7, messages=messages)


def learnt(row: Row, tokenizer: CharacterTokenizer, max_length: int = 1000) -> tuple[str, str]:
    """The example's text, and its text with ``.`` for each token that is not learnt."""
    example = make_example(row, tokenizer, max_length=max_length)
    assert isinstance(example, Example)
    assert len(example.token_ids) == len(example.loss_mask) <= max_length
    shown = [
        tokenizer.decode([token_id]) if mask else "."
        for token_id, mask in zip(example.token_ids, example.loss_mask, strict=True)
    ]
    return tokenizer.decode(example.token_ids), "".join(shown)


def test_only_the_answer_and_the_token_that_ends_it_are_learnt() -> None:
    text, shown = learnt(conversation("u:Hi", "a:Yo"), CharacterTokenizer())
    assert text == "<start>U:Hi<end>\n<start>A:Yo<end>\n"
    # start U : H i end \n start A : | Y o end | \n
    assert shown == ".........." + "Yo<end>" + "."


def test_every_assistant_turn_is_learnt() -> None:
    _, shown = learnt(conversation("s:S", "u:a", "a:b", "u:c", "a:d"), CharacterTokenizer())
    # <start>S:S<end>\n is 6 tokens, <start>U:a<end>\n is 6, <start>A: is 3
    assert shown == "." * 15 + "b<end>" + "." + "." * 6 + "..." + "d<end>" + "."


def test_prompt_and_completion_become_a_turn_each() -> None:
    row = CompletionRow(line=1, prompt="Hi", completion="Yo")
    assert learnt(row, CharacterTokenizer()) == learnt(conversation("u:Hi", "a:Yo"), CharacterTokenizer())


def test_model_without_a_template_learns_completion_and_end() -> None:
    text, shown = learnt(CompletionRow(line=1, prompt="ab", completion="cd"), CharacterTokenizer(style="none"))
    assert text == "<begin>abcd<end>"
    assert shown == "..." + "cd<end>"


def test_conversation_without_a_template_is_plain_paragraphs() -> None:
    text, shown = learnt(conversation("u:a", "a:b", "u:c", "a:d"), CharacterTokenizer(style="none"))
    assert text == "<begin>a\n\nb\n\nc\n\nd<end>"
    assert shown == "...." + "b\n\n" + "..." + "d<end>"


def test_end_token_is_added_where_the_template_writes_none() -> None:
    text, shown = learnt(conversation("u:a", "a:b"), CharacterTokenizer(style="endless"))
    assert text == "<start>U:a\n<start>A:b\n<end>"
    assert shown == "." * 8 + "b\n<end>"


def test_end_token_in_the_prompt_does_not_end_or_start_anything() -> None:
    _, shown = learnt(conversation("u:x<end>y", "a:z"), CharacterTokenizer())
    assert shown == "." * 11 + "z<end>" + "."


def test_earlier_answer_that_the_template_rewrites_is_context_only() -> None:
    tokenizer = CharacterTokenizer(style="last_thinks")
    example = make_example(conversation("u:a", "a:b", "u:c", "a:d"), tokenizer, max_length=100)
    assert isinstance(example, Example)
    assert (example.num_answers, example.num_answers_learnt) == (2, 1)
    assert sum(example.loss_mask) == len("~d") + 1


def test_refusal_of_the_template_is_a_row_error() -> None:
    error = make_example(conversation("s:a", "u:b", "a:c"), CharacterTokenizer(style="strict"), max_length=100)
    assert isinstance(error, RowError)
    assert (error.line, error.field, error.reason) == (7, "messages", RowErrorReason.TEMPLATE_REFUSED)
    assert "no system role" in error.message


def test_template_that_loses_the_answer_is_a_row_error() -> None:
    error = make_example(conversation("u:b", "a:c"), CharacterTokenizer(style="forgetful"), max_length=100)
    assert isinstance(error, RowError)
    assert error.reason is RowErrorReason.TEMPLATE_REWRITES_ANSWER


class MuteTokenizer(CharacterTokenizer):
    """Makes no tokens of the letter x, as normalizers do with characters they drop; adds no beginning and no end."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return super().encode(text.replace("x", ""), add_special_tokens=False)


@pytest.mark.parametrize(
    "row",
    [CompletionRow(line=3, prompt="a", completion="xx"), CompletionRow(line=3, prompt="x", completion="a")],
    ids=["the answer has no tokens", "nothing stands before its only token"],
)
def test_row_without_a_learnt_token_is_an_error(row: Row) -> None:
    error = make_example(row, MuteTokenizer(style="none", eos_token_id=None), max_length=100)
    assert isinstance(error, RowError)
    assert (error.line, error.field, error.reason) == (3, "completion", RowErrorReason.NOTHING_TO_LEARN)


def test_too_long_row_loses_its_oldest_tokens_and_keeps_the_answer() -> None:
    row = CompletionRow(line=1, prompt="abcdefgh", completion="123")
    text, shown = learnt(row, CharacterTokenizer(style="none"), max_length=8)
    assert (text, shown) == ("efgh123<end>", "....123<end>")


def test_answer_that_does_not_fit_loses_its_end_and_keeps_a_quarter_of_context() -> None:
    row = CompletionRow(line=1, prompt="abcdefgh", completion="1234567890")
    text, shown = learnt(row, CharacterTokenizer(style="none"), max_length=8)
    assert (text, shown) == ("gh123456", "..123456")


@pytest.mark.parametrize("max_length", [8, 9, 12, 17, 40])
@pytest.mark.parametrize("answer_length", [1, 5, 7, 8, 9, 60])
def test_whatever_the_lengths_something_of_the_answer_stays(max_length: int, answer_length: int) -> None:
    row = conversation("u:" + "p" * 30, "a:" + "q" * answer_length)
    _, shown = learnt(row, CharacterTokenizer(), max_length=max_length)
    assert shown.startswith(".")
    assert "q" in shown
    example = make_example(row, CharacterTokenizer(), max_length=max_length)
    assert isinstance(example, Example)
    # <start>U:<end>\n<start>A:<end>\n around both texts
    assert example.num_tokens_cut == 10 + 30 + answer_length - len(example.token_ids)


class BytesTokenizer(CharacterTokenizer):
    """One token per byte."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def test_pieces_of_a_character_are_shown_once_it_is_whole() -> None:
    assert text_pieces(list("aé😀b".encode()), BytesTokenizer()) == ["a", "", "é", "", "", "", "😀", "b"]


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest() -> None:
    pieces = text_pieces([0xFF, *b"ab"], BytesTokenizer())
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}ab"
