"""From a row to what a causal model is trained on: token ids, and which of them are to be learnt.

    <|im_start|>user\\nHow?<|im_end|>\\n<|im_start|>assistant\\nLike this.<|im_end|>\\n
    ------------------ 0 ------------------------------------11111111111111111100

Only answers are learnt: every assistant turn, with the token that generation stops at. Where they begin and end comes
from lengths: the conversation up to a turn is rendered as a prompt, and where its tokens end in the tokens of the
whole, the answer begins. Token ids never decide it, for the end of a turn often is the padding token too.

Templates that show earlier turns differently from the last one leave an earlier answer without a place in the whole;
such an answer is context only and is counted (``num_answers``, ``num_answers_learnt``). Models without a template learn
``prompt + completion + end``.

Works on any tokenizer of the ``ExampleTokenizer`` protocol, so that the preview in a service without torch and the
runner make the same examples. Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from slipstream_server.errors import InvalidRequest
from slipstream_server.training.rows import ConversationRow, Message, Row, RowError, RowErrorReason

# A model without a template gets conversations as plain lines, one blank line between turns.
_TURN_SEPARATOR = "\n\n"


class ExampleTokenizer(Protocol):
    """A model's tokenizer and chat template, as far as making examples needs them."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def eos_token_id(self) -> int | None:
        """Appended where the text itself does not end with one of ``stop_token_ids``."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Every id that generation stops at."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]: ...

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Raises InvalidRequest, with a text fit for the user, where the template refuses the messages."""


class PreviewTokenizer(ExampleTokenizer, Protocol):
    """An ``ExampleTokenizer`` that can also show what it did."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, special tokens written out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """``loss_mask[i]`` is True where ``token_ids[i]`` is to be learnt; both have one length, at most ``max_length``."""

    line: int
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    num_tokens_cut: int
    num_answers: int
    num_answers_learnt: int

    @property
    def num_labels(self) -> int:
        """Tokens that give a loss. The first token has nothing before it to be predicted from."""
        return sum(self.loss_mask[1:])


class _Refused(Exception):
    def __init__(self, reason: RowErrorReason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def make_example(row: Row, tokenizer: ExampleTokenizer, *, max_length: int) -> Example | RowError:
    """The example of ``row``, cut to ``max_length`` tokens, or why there is none."""
    try:
        whole = _with_template(row, tokenizer) if tokenizer.has_chat_template else _plain(row, tokenizer)
        example = _cut(row.line, whole, max_length)
        if example.num_labels == 0:
            raise _Refused(RowErrorReason.NOTHING_TO_LEARN, "no token of the row would be learnt")
        return example
    except _Refused as refused:
        return RowError(line=row.line, field=_field(row), reason=refused.reason, message=refused.message)


def text_pieces(token_ids: Sequence[int], tokenizer: PreviewTokenizer) -> list[str]:
    """What each token adds to the text; where a character takes several tokens, its last one holds it and the others
    nothing.
    """
    pieces: list[str] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        piece = tokenizer.decode(token_ids[start:end])
        is_whole = not piece.endswith("�") or end - start >= 4
        pieces.append(piece if is_whole else "")
        start = end if is_whole else start
    return pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """A row's tokens before cutting; ``answers`` are half-open ranges of them, in order, and the last one is the row's
    last answer.
    """

    token_ids: Sequence[int]
    answers: Sequence[tuple[int, int]]
    num_answers: int


def _field(row: Row) -> str:
    return "messages" if isinstance(row, ConversationRow) else "completion"


def _messages(row: Row) -> tuple[Message, ...]:
    if isinstance(row, ConversationRow):
        return row.messages
    return (Message(role="user", content=row.prompt), Message(role="assistant", content=row.completion))


def _with_template(row: Row, tokenizer: ExampleTokenizer) -> _Whole:
    messages = _messages(row)
    token_ids = list(_render(tokenizer, messages, is_prompt=False))
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    answers = []
    for place in places:
        is_last = place == len(messages) - 1
        prompt = _render(tokenizer, messages[:place], is_prompt=True)
        until = token_ids if is_last else _render(tokenizer, messages[: place + 1], is_prompt=False)
        answer = _answer_range(token_ids, prompt, until, tokenizer)
        if answer is not None:
            answers.append(answer)
        elif is_last:
            message = (
                "the model's template shows the conversation before the last answer differently once it is answered"
            )
            raise _Refused(RowErrorReason.TEMPLATE_REWRITES_ANSWER, message)
    start, end = answers[-1]
    if not tokenizer.stop_token_ids.intersection(token_ids[start:end]) and tokenizer.eos_token_id is not None:
        token_ids[end:] = [tokenizer.eos_token_id]
        answers[-1] = (start, end + 1)
    return _Whole(token_ids=token_ids, answers=answers, num_answers=len(places))


def _render(tokenizer: ExampleTokenizer, messages: Sequence[Message], *, is_prompt: bool) -> Sequence[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.render(turns, add_generation_prompt=is_prompt)
    except InvalidRequest as error:
        raise _Refused(RowErrorReason.TEMPLATE_REFUSED, error.message[:500]) from error
    return tokenizer.encode(text, add_special_tokens=False)


def _answer_range(
    whole: Sequence[int], prompt: Sequence[int], until: Sequence[int], tokenizer: ExampleTokenizer
) -> tuple[int, int] | None:
    """The tokens of the answer that begins after ``prompt``, up to the stop token that ends it; None where it has no
    place in ``whole``.

    One token at the seam may differ, where the tokenizer joins the prompt's last characters with the answer's first.
    """
    start = _common_length(whole, prompt)
    end = _common_length(whole, until)
    if start < len(prompt) - 1 or end < len(until) - 1 or end <= start:
        return None
    stops = [place for place in range(start, end) if whole[place] in tokenizer.stop_token_ids]
    return start, stops[-1] + 1 if stops else end


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    shorter = min(len(left), len(right))
    return next((place for place in range(shorter) if left[place] != right[place]), shorter)


def _plain(row: Row, tokenizer: ExampleTokenizer) -> _Whole:
    """Turns after each other; every answer is tokenized by itself, as generation continues the tokens before it."""
    if not isinstance(row, ConversationRow):
        turns = [(row.prompt, False), (row.completion, True)]
    else:
        turns = [(message.content + _TURN_SEPARATOR, message.role == "assistant") for message in row.messages[:-1]]
        turns.append((row.messages[-1].content, True))
    token_ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for place, (text, is_answer) in enumerate(turns):
        start = len(token_ids)
        token_ids += tokenizer.encode(text, add_special_tokens=place == 0)
        if is_answer:
            answers.append((start, len(token_ids)))
    if tokenizer.eos_token_id is not None:
        token_ids.append(tokenizer.eos_token_id)
        answers[-1] = (answers[-1][0], len(token_ids))
    return _Whole(token_ids=token_ids, answers=answers, num_answers=len(answers))


def _cut(line: int, whole: _Whole, max_length: int) -> Example:
    """At most ``max_length`` tokens around the last answer.

    The oldest tokens go first. Only when a quarter of the room is left for what stands before the answer does the
    answer lose its end.
    """
    first, last = whole.answers[-1]
    length = len(whole.token_ids)
    if length <= max_length:
        begin, end = 0, length
    else:
        context = min(first, max(1, max_length // 4))
        begin = min(first - context, max(0, last - max_length))
        end = min(last, begin + max_length)
    kept = [(max(start, begin), min(stop, end)) for start, stop in whole.answers if start < end and stop > begin]
    learnt = {place for start, stop in kept for place in range(start, stop)}
    return Example(
        line=line,
        token_ids=tuple(whole.token_ids[begin:end]),
        loss_mask=tuple(place in learnt for place in range(begin, end)),
        num_tokens_cut=length - (end - begin),
        num_answers=whole.num_answers,
        num_answers_learnt=len(kept),
    )
