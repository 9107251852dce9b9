"""token-classification: a label for each token, and entities out of them, as Transformers' pipeline builds them.

tokens ── first, average, max: words agree on one label ──> words ──┐
       ── simple ───────────────────────────────────────────────────┼──> neighbours of one label ──> entities
       ── none ─────────────────────────────────────────────────────┴──> as they are
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import TaskInput, TextInput, TokenClassificationResult, TokenSpan, WordsInput
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import Row, TextModel, off_device, piece_of
from slipstream_server.tasks.text.scores import FloatArray, softmax
from slipstream_server.tasks.text.tokens import Cut


@dataclass(frozen=True, slots=True, eq=False)
class _Token:
    """A token that may carry a label; ``continues`` the word of the token before it."""

    text: str
    scores: FloatArray
    start: int
    end: int
    index: int
    continues: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Labelled:
    """A token or a word, with the label it got."""

    label: str
    score: float
    text: str
    start: int
    end: int
    index: int


class TokenClassification:
    """Labels of the model's own head, for each token."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._labels = model.labels()
        self._knows_words = bool(getattr(model.tokenizer._tokenizer.model, "continuing_subword_prefix", None))

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        stride = parameters.get("stride")
        cut: Cut = "first" if parameters.get("truncation") else "none"
        encoder = self._model.encoder
        if stride is not None:
            if parameters.get("aggregation_strategy", "none") == "none":
                raise InvalidField.of("parameters.stride", "needs an aggregation_strategy other than none")
            text = item.words if isinstance(item, WordsInput) else expect(item, TextInput).text
            windows = encoder.windows(
                text, max_tokens=encoder.max_tokens, stride=stride, stride_field="parameters.stride"
            )
            return [piece_of(window, keep=True) for window in windows]
        if isinstance(item, WordsInput):
            return [piece_of(encoder.encode_words(item.words, cut=cut, field="words.words"), keep=True)]
        return [piece_of(encoder.encode(expect(item, TextInput).text, cut=cut, field="text"), keep=True)]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        rows: list[Row] = [piece.payload for piece in pieces]
        output, _ = self._model.forward(rows)
        logits_BTL = off_device(output.logits)
        return [(row, logits_BTL[n, : len(row.token_ids)].copy()) for n, row in enumerate(rows)]

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> TokenClassificationResult:
        strategy = parameters.get("aggregation_strategy", "none")
        ignored = set(parameters.get("ignore_labels", ["O"]))
        text, word_starts = _text_of(item)
        spans: list[TokenSpan] = []
        for row, logits in raw:
            tokens = list(self._tokens(row, softmax(logits), text, word_starts))
            spans += [span for span in self._entities(tokens, strategy) if span.label not in ignored]
        return TokenClassificationResult(_without_overlaps(spans) if len(raw) > 1 else spans)

    def _tokens(
        self, row: Row, scores_TL: FloatArray, text: str, word_starts: Sequence[int] | None
    ) -> Iterator[_Token]:
        encoding = row.encoding
        assert encoding is not None
        words = encoding.word_ids
        for index, is_special in enumerate(encoding.special_tokens_mask):
            if is_special:
                continue
            start, end = encoding.offsets[index]
            if word_starts is not None and (word := words[index]) is not None:
                start, end = start + word_starts[word], end + word_starts[word]
            spelled, covered = str(self._model.tokenizer.convert_ids_to_tokens(row.token_ids[index])), text[start:end]
            if self._knows_words:
                continues = len(spelled) != len(covered)
            else:
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if row.token_ids[index] == self._model.tokenizer.unk_token_id:
                spelled, continues = covered, False
            yield _Token(spelled, scores_TL[index], start, end, index, continues)

    def _entities(self, tokens: Sequence[_Token], strategy: str) -> list[TokenSpan]:
        if strategy in ("none", "simple"):
            labelled = [self._labelled([token], token.scores, token.text) for token in tokens]
        else:
            labelled = [self._word(word, _DECIDE[strategy]) for word in _words(tokens)]
        if strategy == "none":
            return [_span(part.label, part.score, part.text, part, part) for part in labelled]
        return [self._group(group) for group in _groups(labelled)]

    def _word(self, tokens: Sequence[_Token], decide: Callable[[Sequence[_Token]], FloatArray]) -> _Labelled:
        return self._labelled(tokens, decide(tokens), self._joined([token.text for token in tokens]))

    def _labelled(self, tokens: Sequence[_Token], scores: FloatArray, text: str) -> _Labelled:
        best = int(scores.argmax())
        first, last = tokens[0], tokens[-1]
        return _Labelled(self._labels[best], float(scores[best]), text, first.start, last.end, first.index)

    def _group(self, parts: Sequence[_Labelled]) -> TokenSpan:
        label = parts[0].label.split("-", 1)[-1]
        score = float(np.mean([part.score for part in parts]))
        return _span(label, score, self._joined([part.text for part in parts]), parts[0], parts[-1])

    def _joined(self, tokens: list[str]) -> str:
        return str(self._model.tokenizer.convert_tokens_to_string(tokens))


_DECIDE: Mapping[str, Callable[[Sequence[_Token]], FloatArray]] = {
    "first": lambda tokens: tokens[0].scores,
    "max": lambda tokens: max(tokens, key=lambda token: float(token.scores.max())).scores,
    "average": lambda tokens: np.mean([token.scores for token in tokens], axis=0),
}


def _text_of(item: TaskInput) -> tuple[str, list[int] | None]:
    """The whole text, and where its words begin in it if they came one by one."""
    if not isinstance(item, WordsInput):
        return expect(item, TextInput).text, None
    steps = [len(word) + len(item.delimiter) for word in item.words]
    return item.delimiter.join(item.words), list(accumulate(steps, initial=0))[:-1]


def _words(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    word: list[_Token] = []
    for token in tokens:
        if word and not token.continues:
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _groups(parts: Sequence[_Labelled]) -> Iterator[list[_Labelled]]:
    """Neighbours of one label; B- begins a new group."""
    group: list[_Labelled] = []
    for part in parts:
        begins, tag = part.label.startswith("B-"), _tag(part.label)
        if group and (begins or tag != _tag(group[-1].label)):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _span(label: str, score: float, word: str, first: _Labelled, last: _Labelled) -> TokenSpan:
    return TokenSpan(label, score, word, first.start, last.end, first.index)


def _without_overlaps(spans: Sequence[TokenSpan]) -> list[TokenSpan]:
    """Of entities that overlap, which windows of a long text share, the longer one, else the surer one."""
    kept: list[TokenSpan] = []
    for span in sorted(spans, key=lambda span: span.start_char):
        if not kept or span.start_char >= kept[-1].end_char:
            kept.append(span)
        elif (_length(span), span.score) > (_length(kept[-1]), kept[-1].score):
            kept[-1] = span
    return kept


def _length(span: TokenSpan) -> int:
    return span.end_char - span.start_char
