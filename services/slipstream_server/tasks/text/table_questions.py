"""table-question-answering: by models that point at cells (TAPAS) and by those that write the answer (TAPEX's way).

The tokenizer of the first kind exists in Python only and reads pandas tables. For the second kind the table is written
out as one line, as TAPEX was trained on (Liu et al. 2021): ``question col : a | b row 1 : x | y row 2 : ...``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch

from slipstream_server.errors import InvalidField, MissingDependency, PromptTooLong
from slipstream_server.tasks.items import (
    Answer,
    QuestionAnsweringResult,
    TableAnswer,
    TableCell,
    TableQuestionInput,
    TaskInput,
)
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import Row, TextModel

_MAX_NEW_TOKENS = 256
_MAX_CELL_TOKENS = 15
"""Of TAPEX: what is longer was cut in its training."""


@dataclass(frozen=True, slots=True, eq=False)
class _CellLogits:
    """One table's tokens as TAPAS numbers them, and the logits of tokens and of aggregations."""

    features: Mapping[str, torch.Tensor]
    token_logits: torch.Tensor
    aggregation_logits: torch.Tensor | None


class CellSelection:
    """Cells of the table, and what is to be done with them."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, context_tokens: int | None) -> None:
        if importlib.util.find_spec("pandas") is None:
            raise MissingDependency("table-question-answering with this model needs pandas, which is not installed")
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self._max_tokens = context_tokens or 512
        names = getattr(model.config, "aggregation_labels", None) if model.config.num_aggregation_labels else None
        self._aggregators = {int(key): str(name) for key, name in (names or {}).items()}
        self._no_aggregation = getattr(model.config, "no_aggregation_label_index", None)

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        import pandas

        if parameters.get("max_new_tokens") is not None:
            raise InvalidField.of("parameters.max_new_tokens", "this model points at cells and writes nothing")
        asked = checked(item)
        table = pandas.DataFrame([list(row) for row in asked.rows], columns=list(asked.columns), dtype=str)
        truncation = "drop_rows_to_fit" if parameters.get("truncation") else "do_not_truncate"
        features = self._tokenizer(
            table, asked.query, truncation=truncation, max_length=self._max_tokens, return_tensors="pt"
        )
        size = int(features["input_ids"].shape[1])
        if size > self._max_tokens:
            raise PromptTooLong.of(
                "table_question.table", f"{size} tokens exceed the {self._max_tokens} that this model reads"
            )
        return [Piece(size=size, payload=dict(features))]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        longest = max(piece.size for piece in pieces)
        rows = [piece.payload for piece in pieces]
        inputs = {key: torch.cat([_padded(row[key], longest) for row in rows]).to(self._device) for key in rows[0]}
        output = self._model(**inputs)
        logits_BT = output.logits.float().cpu()
        aggregation = output.logits_aggregation.float().cpu() if self._aggregators else None
        return [
            _CellLogits(
                row, logits_BT[n : n + 1, : pieces[n].size], None if aggregation is None else aggregation[n : n + 1]
            )
            for n, row in enumerate(rows)
        ]

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> QuestionAnsweringResult:
        found: _CellLogits = raw[0]
        # The tokenizer clips the logits in place.
        predicted = self._tokenizer.convert_logits_to_predictions(
            found.features, found.token_logits.clone(), found.aggregation_logits
        )
        places = sorted(predicted[0][0]) if predicted[0] else []
        rows = checked(item).rows
        cells = [TableCell(row, column, rows[row][column]) for row, column in places]
        aggregator, prefix = "", ""
        if self._aggregators:
            aggregator = self._aggregators[predicted[1][0]]
            prefix = "" if predicted[1][0] == self._no_aggregation else f"{aggregator} > "
        text = prefix + ", ".join(cell.text for cell in cells)
        return QuestionAnsweringResult([Answer(text=text, table=TableAnswer(aggregator, cells))])


class WrittenTableAnswer:
    """An answer in words, by an encoder-decoder."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        asked = checked(item)
        rows = [[self._short(cell) for cell in row] for row in asked.rows]
        encoding = self._encoded(asked, rows, truncates=bool(parameters.get("truncation")))
        length = self._length(parameters.get("max_new_tokens"))
        return [Piece(size=len(encoding), payload=Row.of(encoding), group=length)]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        input_ids, mask = self._model.padded([piece.payload for piece in pieces])
        max_new_tokens = int(str(pieces[0].group))
        written = self._model.model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, max_length=None
        )
        return list(written.tolist())

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> QuestionAnsweringResult:
        text = self._model.tokenizer.decode(raw[0], skip_special_tokens=True)
        return QuestionAnsweringResult([Answer(text=text)])

    def _length(self, asked: int | None) -> int:
        """Tokens to write at most; a decoder that has places for no more must not be told to."""
        positions = getattr(self._model.config, "max_position_embeddings", None)
        room = int(positions) - 1 if positions else None
        if asked is not None and room is not None and asked > room:
            raise InvalidField.of("parameters.max_new_tokens", f"{asked}; this model has room for {room}")
        return asked if asked is not None else min(_MAX_NEW_TOKENS, room or _MAX_NEW_TOKENS)

    def _encoded(
        self, asked: TableQuestionInput, rows: Sequence[Sequence[str]], *, truncates: bool
    ) -> tokenizers.Encoding:
        """The question and as many rows as fit; a tenth of them goes at a time."""
        while True:
            text = " " + _written_out(asked.query, asked.columns, rows).lower()
            try:
                return self._model.encoder.encode(text, field="table_question.table")
            except PromptTooLong:
                if not truncates or len(rows) == 1:
                    raise
                rows = rows[: len(rows) * 9 // 10]

    def _short(self, cell: str) -> str:
        tokens = self._model.tokenizer.tokenize(cell)
        if len(tokens) < _MAX_CELL_TOKENS or not cell.strip():
            return cell
        return str(self._model.tokenizer.convert_tokens_to_string(tokens[:_MAX_CELL_TOKENS]))


def checked(item: TaskInput) -> TableQuestionInput:
    """The question with a table that is one; raises InvalidField otherwise."""
    asked = expect(item, TableQuestionInput)
    if not asked.query:
        raise InvalidField.of("table_question.query", "is empty")
    if not asked.columns or not asked.rows:
        raise InvalidField.of("table_question.table", "needs at least one column and one row")
    for number, row in enumerate(asked.rows):
        if len(row) != len(asked.columns):
            raise InvalidField.of(
                f"table_question.table.rows[{number}].cells", f"{len(row)} cells for {len(asked.columns)} columns"
            )
    return asked


def _written_out(query: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"row {number} : {' | '.join(row)}" for number, row in enumerate(rows, start=1)]
    return " ".join([query, f"col : {' | '.join(columns)}", *lines])


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """[1, T] or [1, T, 7] with zeros up to ``length``: TAPAS pads with 0 everywhere."""
    missing = length - tensor.shape[1]
    padding = (0, missing) if tensor.dim() == 2 else (0, 0, 0, missing)
    return torch.nn.functional.pad(tensor, padding)
