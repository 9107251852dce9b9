"""The training and held-out examples of a job, as torch wants them.

Batches are padded on the right, and what is padding is known by length: the padding id never decides what is masked or
learnt. In the runner only.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from slipstream_server.errors import InvalidDataset
from slipstream_server.training.examples import Example, ExampleTokenizer, make_example
from slipstream_server.training.recipe import TrainingRecipe
from slipstream_server.training.rows import Row, RowError, RowErrorReason, read_rows
from slipstream_server.training.split import split_rows

IGNORED_LABEL = -100


class ExampleDataset(Dataset[dict[str, Sequence[int]]]):
    """Examples held in 5 bytes a token, so that a million rows fit into memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._token_ids = [array("i", example.token_ids) for example in examples]
        self._loss_masks = [bytes(example.loss_mask) for example in examples]

    def __len__(self) -> int:
        return len(self._token_ids)

    def __getitem__(self, index: int) -> dict[str, Sequence[int]]:
        return {"token_ids": self._token_ids[index], "loss_mask": self._loss_masks[index]}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedCollator:
    """Examples to one batch: ``input_ids``, ``attention_mask`` and ``labels``, all int64 of shape [batch, longest]."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        shape = (len(examples), max(len(example["token_ids"]) for example in examples))
        input_ids_BT = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
        labels_BT = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        for row, example in enumerate(examples):
            ids_T = torch.tensor(example["token_ids"], dtype=torch.int64)
            is_learnt_T = torch.tensor(list(example["loss_mask"]), dtype=torch.bool)
            input_ids_BT[row, : len(ids_T)] = ids_T
            attention_mask_BT[row, : len(ids_T)] = 1
            labels_BT[row, : len(ids_T)] = ids_T.masked_fill(~is_learnt_T, IGNORED_LABEL)
        return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobData:
    """What is trained on, what is held out (empty: no evaluation), and what was lost on the way."""

    train: Sequence[Example]
    held_out: Sequence[Example]

    @property
    def num_truncated(self) -> int:
        return sum(example.num_tokens_cut > 0 for example in (*self.train, *self.held_out))

    @property
    def num_answers_left_out(self) -> int:
        return sum(example.num_answers - example.num_answers_learnt for example in (*self.train, *self.held_out))


def load_data(recipe: TrainingRecipe, tokenizer: ExampleTokenizer) -> JobData:
    """Read, split and tokenize the files of ``recipe``; raises InvalidDataset naming the first row that is wrong."""
    rows = _read(Path(recipe.train_file), "the dataset")
    if recipe.eval_file is not None:
        held_out = _read(Path(recipe.eval_file), "the held-out dataset")
    else:
        seed = recipe.hyperparameters.seed
        rows, held_out = split_rows(rows, held_out_fraction=recipe.held_out_fraction, seed=seed)
    max_length = recipe.hyperparameters.max_length
    return JobData(
        train=_make_examples(rows, tokenizer, max_length), held_out=_make_examples(held_out, tokenizer, max_length)
    )


def _read(path: Path, name: str) -> list[Row]:
    try:
        with path.open("rb") as file:
            rows = []
            for item in read_rows(file):
                if isinstance(item, RowError):
                    raise _invalid(item)
                rows.append(item)
            return rows
    except OSError as error:
        raise InvalidDataset(f"{name} cannot be read: {os.strerror(error.errno or 0)}") from error


def _make_examples(rows: Sequence[Row], tokenizer: ExampleTokenizer, max_length: int) -> list[Example]:
    examples = []
    for row in rows:
        made = make_example(row, tokenizer, max_length=max_length)
        if isinstance(made, RowError):
            raise _invalid(made)
        examples.append(made)
    return examples


def _invalid(error: RowError) -> InvalidDataset:
    place = f"line {error.line}" + (f", {error.field}" if error.field else "")
    subject = "the dataset" if error.reason is RowErrorReason.NO_ROWS else place
    metadata = {"line": str(error.line), "field": error.field, "row_error": error.reason.value}
    return InvalidDataset(f"{subject}: {error.message}", metadata=metadata)
