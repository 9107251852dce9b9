"""Recipes: what is refused, and what a checkpoint is bound to."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from slipstream_server.errors import InvalidField
from slipstream_server.training.recipe import (
    Hyperparameters,
    LoraSettings,
    TrainingRecipe,
    check_recipe,
    encode_recipe,
    parse_recipe,
)

RECIPE = TrainingRecipe(base_model_folder="/models/m", base_model_name="acme/m", train_file="/data/t.jsonl")


def with_value(path: str, value: Any) -> dict[str, Any]:
    document = json.loads(encode_recipe(RECIPE))
    *parents, name = path.split(".")
    target = document
    for parent in parents:
        target = target[parent]
    target[name] = value
    return document  # type: ignore[no-any-return]


def test_recipe_survives_its_file() -> None:
    assert parse_recipe(encode_recipe(RECIPE)) == RECIPE


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hyperparameters.learning_rate", 0),
        ("hyperparameters.learning_rate", -1e-3),
        ("hyperparameters.learning_rate", 1.5),
        ("hyperparameters.learning_rate", "fast"),
        ("hyperparameters.num_epochs", 0),
        ("hyperparameters.num_epochs", 1e9),
        ("hyperparameters.max_steps", 0),
        ("hyperparameters.max_steps", 2**63),
        ("hyperparameters.batch_size_per_device", 0),
        ("hyperparameters.gradient_accumulation_steps", 1.5),
        ("hyperparameters.max_length", 7),
        ("hyperparameters.warmup_ratio", 1.01),
        ("hyperparameters.warmup_steps", -1),
        ("hyperparameters.scheduler", "magic"),
        ("hyperparameters.precision", "float8"),
        ("hyperparameters.max_grad_norm", 0),
        ("hyperparameters.seed", -1),
        ("hyperparameters.seed", 2**32),
        ("hyperparameters.keep_checkpoints", 0),
        ("adapter.rank", 0),
        ("adapter.rank", 1025),
        ("adapter.alpha", 0),
        ("adapter.dropout", 1.0),
        ("adapter.dropout", -0.1),
        ("adapter.target_modules", ["all-linear", "q_proj"]),
        ("adapter.bias", "some"),
        ("held_out_fraction", 0.6),
        ("world_size", 0),
        ("device", "tpu"),
        ("base_model_folder", "relative/folder"),
        ("base_model_name", "/a/path"),
        ("eval_file", "relative.jsonl"),
        ("cpu_threads", 0),
    ],
)
def test_value_out_of_range_names_its_field(path: str, value: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_recipe(json.dumps(with_value(path, value)).encode())
    assert [violation.field for violation in caught.value.violations] == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    recipe = msgspec.structs.replace(RECIPE, hyperparameters=Hyperparameters(learning_rate=value, num_epochs=value))
    with pytest.raises(InvalidField) as caught:
        check_recipe(recipe)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"hyperparameters.learning_rate", "hyperparameters.num_epochs"}


def test_bad_module_name_is_shown_by_its_place() -> None:
    recipe = msgspec.structs.replace(RECIPE, adapter=LoraSettings(target_modules=("q_proj", "../x")))
    with pytest.raises(InvalidField, match=r"adapter.target_modules\[1\]"):
        check_recipe(recipe)


@pytest.mark.parametrize("path", ["extra", "adapter.extra", "hyperparameters.extra"])
def test_unknown_keys_are_refused(path: str) -> None:
    with pytest.raises(InvalidField, match="extra"):
        parse_recipe(json.dumps(with_value(path, 1)).encode())


def test_digest_ignores_where_files_lie_and_nothing_else() -> None:
    moved = msgspec.structs.replace(
        RECIPE, base_model_folder="/elsewhere", train_file="/elsewhere.jsonl", cpu_threads=7
    )
    changed = msgspec.structs.replace(RECIPE, hyperparameters=Hyperparameters(seed=1))
    assert moved.digest() == RECIPE.digest() != changed.digest()


@pytest.mark.parametrize(
    ("hyperparameters", "world_size", "expected"),
    [
        # 100 rows: 13 batches of 8, 7 updates of two batches an epoch
        (Hyperparameters(num_epochs=3, gradient_accumulation_steps=2, warmup_ratio=0.1), 1, (21, 3)),
        # 13 batches over 2 processes: 7 each
        (Hyperparameters(num_epochs=1), 2, (7, 0)),
        (Hyperparameters(num_epochs=0.01), 1, (1, 0)),
        (Hyperparameters(max_steps=5, warmup_steps=9), 1, (5, 5)),
    ],
)
def test_schedule_is_what_a_hand_counts(
    hyperparameters: Hyperparameters, world_size: int, expected: tuple[int, int]
) -> None:
    assert hyperparameters.schedule(num_examples=100, world_size=world_size) == expected
