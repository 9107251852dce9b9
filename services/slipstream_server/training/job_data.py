"""The rows of a job: checked with the base model's own tokenizer, and written where the runner will read them.

The runner's files hold the usable rows of the chosen splits, one canonical JSON line each; their hash is the digest of
what was trained on. Blocking, for as long as the dataset is large; run it in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slipstream_server.errors import InvalidDataset
from slipstream_server.training.dataset_rows import chosen_split, read_split, splits_of
from slipstream_server.training.examples import ExampleTokenizer, make_example
from slipstream_server.training.resources import TRAIN_SPLIT, FileOfDataset
from slipstream_server.training.rows import Row, RowError, RowErrorReason, canonical_bytes
from slipstream_server.training.specification import JobSpec

TRAIN_FILE = "train.jsonl"
EVALUATION_FILE = "evaluation.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobData:
    """What was written. ``num_evaluation_rows`` is that of the evaluation split; 0 where rows are held out."""

    digest: str
    num_train_rows: int
    num_evaluation_rows: int
    num_skipped_rows: int
    num_tokens: int
    longest_tokens: int
    has_evaluation_file: bool


def splits_for(spec: JobSpec, files: Sequence[FileOfDataset]) -> tuple[str, str | None]:
    """The split to train on, and the one to evaluate on where there is one. Raises InvalidField."""
    names = splits_of(files)
    train = chosen_split(names, spec.train_split, "spec.dataset.train_split", TRAIN_SPLIT, *names)
    assert train is not None
    evaluation = chosen_split(names, spec.evaluation_split, "spec.dataset.evaluation_split", "validation")
    return train, evaluation if evaluation != train else None


def write_job_data(
    folder: Path | None, dataset: Path, files: Sequence[FileOfDataset], spec: JobSpec, tokenizer: ExampleTokenizer
) -> JobData:
    """Check the rows that ``spec`` chooses and write them into ``folder`` (None: check only).

    Raises InvalidDataset naming the first row that cannot be trained on, or where no row is left; OSError.
    """
    train, evaluation = splits_for(spec, files)
    writing = _Writing(dataset=dataset, files=files, spec=spec, tokenizer=tokenizer)
    num_train = writing.copy(train, folder and folder / TRAIN_FILE)
    if num_train == 0:
        raise InvalidDataset(f"the split {train} has no row that can be trained on", metadata={"split": train})
    num_evaluation = writing.copy(evaluation, folder and folder / EVALUATION_FILE) if evaluation else 0
    if evaluation and num_evaluation == 0:
        raise InvalidDataset(f"the split {evaluation} has no usable row", metadata={"split": evaluation})
    return JobData(
        digest=writing.hash.hexdigest(),
        num_train_rows=num_train,
        num_evaluation_rows=num_evaluation,
        num_skipped_rows=writing.num_skipped,
        num_tokens=writing.num_tokens,
        longest_tokens=writing.longest_tokens,
        has_evaluation_file=evaluation is not None,
    )


class _Writing:
    def __init__(
        self, *, dataset: Path, files: Sequence[FileOfDataset], spec: JobSpec, tokenizer: ExampleTokenizer
    ) -> None:
        self._dataset, self._files, self._spec, self._tokenizer = dataset, files, spec, tokenizer
        self.hash = hashlib.sha256()
        self.num_skipped = 0
        self.num_tokens = self.longest_tokens = 0

    def copy(self, split: str, target: Path | None) -> int:
        """The number of usable rows of ``split``."""
        self.hash.update(f"{split}\n".encode())
        num_rows = 0
        with ExitStack() as stack:
            file = stack.enter_context(target.open("wb")) if target else None
            for row in read_split(self._dataset, self._files, split):
                error = row.item if isinstance(row.item, RowError) else self._take(row.item, file)
                num_rows += error is None
                if error is not None:
                    self._refuse_or_skip(split, row.path, error)
        return num_rows

    def _take(self, row: Row, file: BinaryIO | None) -> RowError | None:
        made = make_example(row, self._tokenizer, max_length=self._spec.hyperparameters.max_length)
        if isinstance(made, RowError):
            return made
        content = canonical_bytes(row) + b"\n"
        self.hash.update(content)
        self.num_tokens += len(made.token_ids)
        self.longest_tokens = max(self.longest_tokens, len(made.token_ids))
        if file is not None:
            file.write(content)
        return None

    def _refuse_or_skip(self, split: str, path: str, error: RowError) -> None:
        if not self._spec.skip_invalid_rows or error.reason is RowErrorReason.TOO_MANY_ROWS:
            raise _invalid(split, path, error)
        self.num_skipped += 1


def _invalid(split: str, path: str, error: RowError) -> InvalidDataset:
    place = f"{path}, line {error.line}" + (f", {error.field}" if error.field else "")
    metadata = {
        "split": split,
        "path": path,
        "line": str(error.line),
        "field": error.field,
        "row_error": error.reason.value,
    }
    return InvalidDataset(f"{place}: {error.message}", metadata=metadata)
