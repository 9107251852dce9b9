"""Rows as a job would train on them: their fields, and with a model their text, tokens and loss mask.

Blocking; run it in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from slipstream_server.training.dataset_rows import LocatedRow, is_of_file, located, read_split
from slipstream_server.training.examples import Example, PreviewTokenizer, make_example, text_pieces
from slipstream_server.training.resources import FileOfDataset, LocatedError
from slipstream_server.training.rows import RowError, canonical_bytes

MAX_COUNTED_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewToken:
    token_id: int
    text: str
    in_loss: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRow:
    """``tokens`` is empty without a tokenizer and for rows with errors."""

    row_index: int
    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[PreviewToken, ...] = ()
    is_truncated: bool = False
    errors: tuple[LocatedError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """``lengths`` are those of the rows shown and of up to 1,000 more, in tokens before cutting."""

    rows: tuple[PreviewRow, ...]
    lengths: tuple[int, ...]
    num_truncated: int


def preview_rows(
    folder: Path,
    files: Sequence[FileOfDataset],
    split: str,
    *,
    start_row: int,
    num_rows: int,
    tokenizer: PreviewTokenizer | None,
    max_length: int,
) -> Preview:
    """Rows ``start_row`` and on of ``split``, cut at ``max_length`` tokens."""
    rows = (row for row in read_split(folder, files, split) if not is_of_file(row.item))
    wanted = islice(rows, start_row, None)
    shown, examples = [], []
    for index, row in enumerate(islice(wanted, num_rows), start=start_row):
        made = None if tokenizer is None else _example(row, tokenizer, max_length)
        shown.append(_shown(index, row, made, split, tokenizer))
        examples.append(made)
    if tokenizer is not None:
        examples += list(_further(wanted, tokenizer, max_length))
    counted = [example for example in examples if isinstance(example, Example)]
    return Preview(
        rows=tuple(shown),
        lengths=tuple(len(example.token_ids) + example.num_tokens_cut for example in counted),
        num_truncated=sum(example.num_tokens_cut > 0 for example in counted),
    )


def _further(rows: Iterator[LocatedRow], tokenizer: PreviewTokenizer, max_length: int) -> Iterator[Example | RowError]:
    return (_example(row, tokenizer, max_length) for row in islice(rows, MAX_COUNTED_ROWS))


def _example(row: LocatedRow, tokenizer: PreviewTokenizer, max_length: int) -> Example | RowError:
    return row.item if isinstance(row.item, RowError) else make_example(row.item, tokenizer, max_length=max_length)


def _shown(
    index: int, row: LocatedRow, made: Example | RowError | None, split: str, tokenizer: PreviewTokenizer | None
) -> PreviewRow:
    fields = {} if isinstance(row.item, RowError) else json.loads(canonical_bytes(row.item))
    error = next((item for item in (row.item, made) if isinstance(item, RowError)), None)
    if error is not None:
        wrong = (located(split, row.path, error),)
        return PreviewRow(row_index=index, line=row.item.line, fields=fields, errors=wrong)
    if not isinstance(made, Example) or tokenizer is None:
        return PreviewRow(row_index=index, line=row.item.line, fields=fields)
    pieces = text_pieces(made.token_ids, tokenizer)
    tokens = zip(made.token_ids, pieces, made.loss_mask, strict=True)
    return PreviewRow(
        row_index=index,
        line=row.item.line,
        fields=fields,
        tokens=tuple(PreviewToken(token_id=token, text=text, in_loss=learnt) for token, text, learnt in tokens),
        is_truncated=made.num_tokens_cut > 0,
    )
