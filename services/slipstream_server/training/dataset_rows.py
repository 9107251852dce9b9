"""The rows of a stored dataset: read split by split, checked as a whole, and counted.

Errors are located: split, file and line. Works on a folder of the dataset's files; blocking, for as long as they are
large; run it in a thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slipstream_server.errors import InvalidField
from slipstream_server.training.resources import (
    TRAIN_SPLIT,
    DatasetReport,
    FileOfDataset,
    LocatedError,
    SplitCount,
)
from slipstream_server.training.rows import (
    ConversationRow,
    Row,
    RowError,
    RowErrorReason,
    RowFormat,
    RowLimits,
    read_rows,
)

MAX_LISTED_ERRORS = 100
_OF_THE_FILE = frozenset({RowErrorReason.TOO_MANY_ROWS, RowErrorReason.NO_ROWS})


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedRow:
    """A row, or what is wrong with it; ``path`` is its file's within the dataset."""

    path: str
    item: Row | RowError


def splits_of(files: Sequence[FileOfDataset]) -> tuple[str, ...]:
    """The names of the splits, the training split first, the others as they were announced."""
    names = dict.fromkeys(file.split for file in files)
    return tuple(sorted(names, key=lambda name: name != TRAIN_SPLIT))


def read_split(folder: Path, files: Sequence[FileOfDataset], split: str) -> Iterator[LocatedRow]:
    """Every row of ``split`` in the order of the files; rows over the limit of a whole dataset end it."""
    limits = RowLimits()
    num_left = limits.max_rows
    for file in files:
        if file.split != split:
            continue
        with (folder / file.path).open("rb") as content:
            for item in read_rows(content, RowLimits(max_rows=max(1, num_left))):
                num_left -= 1
                yield LocatedRow(path=file.path, item=item)


def is_of_file(item: Row | RowError) -> bool:
    """Whether ``item`` speaks of a file as a whole and is no row of it."""
    return isinstance(item, RowError) and item.reason in _OF_THE_FILE


def check_dataset(folder: Path, files: Sequence[FileOfDataset], wanted_format: str) -> DatasetReport:
    """Read every row of every split; ``wanted_format`` empty: as the first row is."""
    check = _Check(wanted_format=wanted_format)
    splits = tuple(check.count(folder, files, name) for name in splits_of(files))
    return DatasetReport(
        row_format=check.wanted_format,
        splits=splits,
        errors=tuple(check.errors),
        error_counts={str(reason): count for reason, count in check.counts.items()},
    )


def located(split: str, path: str, error: RowError) -> LocatedError:
    return LocatedError(
        split=split,
        path=path,
        line=error.line,
        field=error.field,
        reason=error.reason.value,
        message=error.message[:500],
    )


def chosen_split(names: Sequence[str], wanted: str, field_name: str, *usual: str) -> str | None:
    """``wanted`` if there is such a split; where nothing is wanted, the first of the ``usual`` ones there is, or None.

    Raises InvalidField for a split that the dataset has not.
    """
    if wanted and wanted not in names:
        raise InvalidField.of(field_name, f"{wanted[:63]!a} is no split of the dataset; it has {', '.join(names)}")
    return wanted or next((name for name in usual if name in names), None)


@dataclass(slots=True, kw_only=True)
class _Check:
    wanted_format: str
    errors: list[LocatedError] = field(default_factory=list)
    counts: Counter[RowErrorReason] = field(default_factory=Counter)

    def count(self, folder: Path, files: Sequence[FileOfDataset], split: str) -> SplitCount:
        num_rows = num_invalid = 0
        for row in read_split(folder, files, split):
            num_rows += not is_of_file(row.item)
            error = row.item if isinstance(row.item, RowError) else self._misfit(row.item)
            if error is not None:
                num_invalid += not is_of_file(row.item)
                self._add(split, row.path, error)
        return SplitCount(name=split, num_rows=num_rows, num_invalid_rows=num_invalid)

    def _misfit(self, row: Row) -> RowError | None:
        """A row of another format than the first of all files, or than was announced."""
        found = RowFormat.MESSAGES if isinstance(row, ConversationRow) else RowFormat.PROMPT_COMPLETION
        self.wanted_format = self.wanted_format or found
        if found == self.wanted_format:
            return None
        message = f"a {found} row in a dataset of {self.wanted_format} rows"
        return RowError(line=row.line, field="", reason=RowErrorReason.MIXED_FORMATS, message=message)

    def _add(self, split: str, path: str, error: RowError) -> None:
        self.counts[error.reason] += 1
        if len(self.errors) < MAX_LISTED_ERRORS:
            self.errors.append(located(split, path, error))
