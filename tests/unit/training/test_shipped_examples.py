"""The instruction file that ships: valid, of one voice, and its held-out questions are never trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slipstream_server.training.recipe import Hyperparameters, LoraSettings, TrainingRecipe, check_recipe
from slipstream_server.training.rows import ConversationRow, read_rows

FOLDER = Path(__file__).parents[3] / "examples" / "aurora_desk"


@pytest.fixture(scope="module")
def behaviour() -> dict[str, Any]:
    return json.loads((FOLDER / "behaviour.json").read_bytes())  # type: ignore[no-any-return]


def rows_of(name: str) -> list[ConversationRow]:
    with (FOLDER / name).open("rb") as file:
        rows = list(read_rows(file))
    assert all(isinstance(row, ConversationRow) for row in rows)
    return [row for row in rows if isinstance(row, ConversationRow)]


@pytest.mark.parametrize(("name", "least"), [("train.jsonl", 150), ("held_out.jsonl", 20)])
def test_every_answer_matches_the_pattern(behaviour: dict[str, Any], name: str, least: int) -> None:
    rows = rows_of(name)
    assert len(rows) >= least
    assert [row.line for row in rows if not re.fullmatch(behaviour["pattern"], row.messages[-1].content)] == []


def test_questions_are_all_different_and_held_out_ones_are_not_trained_on() -> None:
    trained, held_out = (
        [row.messages[0].content for row in rows_of(name)] for name in ("train.jsonl", "held_out.jsonl")
    )
    assert len({*trained, *held_out}) == len(trained) + len(held_out)


def test_training_settings_are_a_valid_recipe(behaviour: dict[str, Any]) -> None:
    settings = behaviour["training"]
    recipe = TrainingRecipe(
        base_model_folder="/models/m",
        base_model_name="acme/m",
        train_file=str(FOLDER / behaviour["train_file"]),
        eval_file=str(FOLDER / behaviour["held_out_file"]),
        adapter=msgspec.convert(settings["adapter"], LoraSettings),
        hyperparameters=msgspec.convert(settings["hyperparameters"], Hyperparameters),
    )
    check_recipe(recipe)
