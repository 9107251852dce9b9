"""question-answering: the stretch of a text that answers a question, as Transformers 4.57 cut it out.

A long text is read in windows. In each, start and end are softmaxed over the tokens of the text (and [CLS], which
stands for "no answer"); answers of the same words, in whatever window, add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import (
    Answer,
    CharacterSpan,
    QuestionAnsweringInput,
    QuestionAnsweringResult,
    TaskInput,
)
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import Row, TextModel, off_device
from slipstream_server.tasks.text.scores import FloatArray, softmax

_USUAL_WINDOW_TOKENS = 384
_USUAL_STRIDE_TOKENS = 128
_IMPOSSIBLE_LOGIT = -10000.0
_NO_NULL_SCORE = 1_000_000.0


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """A window and its logits, one for each token."""

    row: Row
    start_logits: FloatArray
    end_logits: FloatArray


@dataclass(slots=True)
class _Found:
    score: float
    start: int
    end: int
    text: str


class QuestionAnswering:
    """Answers cut out of the caller's text."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._cls_id = model.tokenizer.cls_token_id
        # Models that pad on the left (XLNet) were trained with the text before the question.
        self._question_first = model.tokenizer.padding_side == "right"

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        asked = expect(item, QuestionAnsweringInput)
        for field, text in (("question", asked.question), ("context", asked.context)):
            if not text:
                raise InvalidField.of(f"question_answering.{field}", "is empty")
        window_tokens, stride = self._window_sizes(parameters)
        texts = (asked.question, asked.context)
        windows = self._model.encoder.windows(
            *(texts if self._question_first else reversed(texts)),
            max_tokens=window_tokens,
            stride=stride,
            cut_second=self._question_first,
            stride_field="parameters.doc_stride",
            staying_field="question_answering.question",
            max_first_tokens=parameters.get("max_question_len"),
        )
        return [Piece(size=len(row.token_ids), payload=row) for row in Row.of_windows(windows)]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        rows: list[Row] = [piece.payload for piece in pieces]
        output, _ = self._model.forward(rows)
        start_BT, end_BT = off_device(output.start_logits), off_device(output.end_logits)
        return [
            _Window(row, start_T[: len(row.token_ids)].copy(), end_T[: len(row.token_ids)].copy())
            for row, start_T, end_T in zip(rows, start_BT, end_BT, strict=True)
        ]

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> QuestionAnsweringResult:
        context = expect(item, QuestionAnsweringInput).context
        top_k, aligns = parameters.get("top_k", 1), parameters.get("align_to_words", True)
        # Alignment makes candidates fall together: some more of them are needed.
        num_candidates = 2 * top_k + 10 if aligns else top_k
        found: dict[str, _Found] = {}
        null_score = _NO_NULL_SCORE
        for window in raw:
            allowed_T, start_T, end_T = self._probabilities(window)
            null_score = min(null_score, float(start_T[0] * end_T[0]))
            start_T[0] = end_T[0] = 0.0
            for first, last, score in _best_spans(start_T, end_T, num_candidates, parameters.get("max_answer_len", 15)):
                if allowed_T[first] and allowed_T[last]:
                    start, end = self._characters(window.row.encoding, first, last, aligns=aligns)
                    text = context[start:end]
                    found.setdefault(text.lower(), _Found(0.0, start, end, text)).score += score
        answers = list(found.values())
        if parameters.get("handle_impossible_answer"):
            answers.append(_Found(null_score, 0, 0, ""))
        answers.sort(key=lambda answer: -answer.score)
        best = answers[:top_k] or [_Found(0.0, 0, 0, "")]
        return QuestionAnsweringResult(
            [Answer(text=a.text, score=a.score, character_span=CharacterSpan(a.start, a.end)) for a in best]
        )

    def _window_sizes(self, parameters: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of a window, and how many neighbours share."""
        most = self._model.encoder.max_tokens
        wanted = parameters.get("max_seq_len")
        if wanted is not None and most is not None and wanted > most:
            raise InvalidField.of("parameters.max_seq_len", f"{wanted} exceeds the {most} tokens that this model reads")
        window = min(most or _USUAL_WINDOW_TOKENS, _USUAL_WINDOW_TOKENS) if wanted is None else wanted
        stride = parameters.get("doc_stride")
        if stride is not None and stride > window:
            raise InvalidField.of("parameters.doc_stride", f"{stride} exceeds max_seq_len, which is {window}")
        return window, min(window // 2, _USUAL_STRIDE_TOKENS) if stride is None else stride

    def _probabilities(self, window: _Window) -> tuple[np.ndarray[Any, Any], FloatArray, FloatArray]:
        """Which tokens may be in an answer, and the probabilities that it starts and ends at each."""
        encoding = window.row.encoding
        assert encoding is not None
        text_sequence = 1 if self._question_first else 0
        allowed = [sequence == text_sequence for sequence in encoding.sequence_ids]
        if not self._question_first:
            # As version 4 had it: its mask came out as 0 for every token there.
            allowed = [True] * len(allowed)
        allowed_T = np.array(allowed)
        if self._cls_id is not None:
            allowed_T |= np.array(window.row.token_ids) == self._cls_id
        start_T = softmax(np.where(allowed_T, window.start_logits, np.float32(_IMPOSSIBLE_LOGIT)))
        end_T = softmax(np.where(allowed_T, window.end_logits, np.float32(_IMPOSSIBLE_LOGIT)))
        return allowed_T, start_T, end_T

    def _characters(
        self, encoding: tokenizers.Encoding | None, first: int, last: int, *, aligns: bool
    ) -> tuple[int, int]:
        """Where tokens ``first`` to ``last`` stand in the text, widened to whole words where there are any."""
        assert encoding is not None
        if aligns:
            sequence = 1 if self._question_first else 0
            first_word, last_word = encoding.token_to_word(first), encoding.token_to_word(last)
            if first_word is not None and last_word is not None:
                begin = encoding.word_to_chars(first_word, sequence_index=sequence)
                end = encoding.word_to_chars(last_word, sequence_index=sequence)
                if begin is not None and end is not None:
                    return begin[0], end[1]
        return encoding.offsets[first][0], encoding.offsets[last][1]


def _best_spans(
    start_T: FloatArray, end_T: FloatArray, num_spans: int, max_answer_tokens: int
) -> list[tuple[int, int, float]]:
    """The likeliest (first token, last token, probability), best first."""
    scores_TT = np.tril(np.triu(np.outer(start_T, end_T)), max_answer_tokens - 1)
    flat = scores_TT.ravel()
    if num_spans == 1:
        best = np.array([flat.argmax()])
    elif len(flat) <= num_spans:
        best = np.argsort(-flat)
    else:
        unordered = np.argpartition(-flat, num_spans)[:num_spans]
        best = unordered[np.argsort(-flat[unordered])]
    firsts, lasts = np.unravel_index(best, scores_TT.shape)
    return [(int(first), int(last), float(scores_TT[first, last])) for first, last in zip(firsts, lasts, strict=True)]
