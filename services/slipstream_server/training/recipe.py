"""What the runner is told to do: one JSON file, written by the supervisor, checked before anything is loaded.

``parse_recipe`` refuses unknown keys and wrong types; ``check_recipe`` finds every value out of range at once and names
its field. Paths in a recipe are the supervisor's own, never a caller's. Needs no torch, so that CreateTrainingJob can
check a request with it. Pure functions; any thread.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import msgspec

from slipstream_server.errors import FieldViolation, InvalidField

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Device = Literal["auto", "cpu"]
Precision = Literal["auto", "float32", "bfloat16"]
Bias = Literal["none", "lora_only", "all"]

ALL_LINEAR = "all-linear"
MAX_RECIPE_BYTES = 1024 * 1024

_MODULE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MAX_MODULES = 256


class LoraSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A low-rank adapter. ``alpha`` unset is twice the rank; ``target_modules`` empty is what PEFT lists for the
    architecture.
    """

    method: Literal["lora"] = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    modules_to_save: tuple[str, ...] = ()
    bias: Bias = "none"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def effective_alpha(self) -> float:
        """A whole number as an int, as configurations usually write it."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return int(alpha) if float(alpha).is_integer() else alpha


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train. ``max_steps``, where set, wins over ``num_epochs``; ``warmup_steps``, where set, over
    ``warmup_ratio``.

    A step is one update of the weights. Evaluation always happens before the first and after the last step;
    ``evaluation_interval_steps`` adds those between. A checkpoint is always written at the last step.
    """

    num_epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    batch_size_per_device: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int = 1024
    warmup_steps: int | None = None
    warmup_ratio: float = 0.0
    scheduler: Scheduler = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    logging_interval_steps: int = 5
    evaluation_interval_steps: int | None = None
    checkpoint_interval_steps: int = 100
    keep_checkpoints: int = 2
    precision: Precision = "auto"

    def schedule(self, *, num_examples: int, world_size: int) -> tuple[int, int]:
        """``(total steps, warm-up steps)`` for so many examples on so many processes."""
        num_batches = math.ceil(math.ceil(num_examples / self.batch_size_per_device) / world_size)
        steps_per_epoch = math.ceil(num_batches / self.gradient_accumulation_steps)
        total = self.max_steps if self.max_steps is not None else max(1, math.ceil(self.num_epochs * steps_per_epoch))
        warmup = self.warmup_steps if self.warmup_steps is not None else math.ceil(self.warmup_ratio * total)
        return total, min(warmup, total)


class TrainingRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job. ``base_model_name`` is what the adapter says it was trained on: a portable name, never a path.

    The held-out rows are those of ``eval_file`` where given, otherwise ``held_out_fraction`` of the training file (0:
    no evaluation). ``cpu_threads`` unset: the cores this process may use, shared by the processes of the job.
    """

    base_model_folder: str
    base_model_name: str
    train_file: str
    eval_file: str | None = None
    held_out_fraction: float = 0.1
    base_model_digest: str = ""
    dataset_digest: str = ""
    adapter: LoraSettings = LoraSettings()
    hyperparameters: Hyperparameters = Hyperparameters()
    device: Device = "auto"
    world_size: int = 1
    cpu_threads: int | None = None

    def digest(self) -> str:
        """SHA-256 over all that decides the result: a checkpoint is resumed only under the same digest."""
        values = msgspec.to_builtins(self)
        for key in ("base_model_folder", "train_file", "eval_file", "cpu_threads"):
            del values[key]
        return hashlib.sha256(msgspec.json.encode(values, order="sorted")).hexdigest()


def parse_recipe(content: bytes) -> TrainingRecipe:
    """The checked recipe in ``content``; raises InvalidField."""
    if len(content) > MAX_RECIPE_BYTES:
        raise InvalidField.of("recipe", f"{len(content)} bytes; at most {MAX_RECIPE_BYTES}")
    try:
        recipe = msgspec.json.decode(content, type=TrainingRecipe)
    except msgspec.DecodeError as error:
        path = re.search(r"at `\$\.?([^`]*)`", str(error))
        raise InvalidField.of((path and path[1]) or "recipe", str(error).split(" - at ")[0]) from error
    check_recipe(recipe)
    return recipe


def encode_recipe(recipe: TrainingRecipe) -> bytes:
    """The JSON that ``parse_recipe`` reads."""
    return msgspec.json.format(msgspec.json.encode(recipe, order="sorted"), indent=2)


def check_recipe(recipe: TrainingRecipe) -> None:
    """Raise one InvalidField that lists every value of ``recipe`` that is out of range."""
    violations = list(_violations(recipe))
    if violations:
        first = violations[0]
        raise InvalidField(f"{first.field}: {first.description}", violations=violations)


# Field: lowest and highest value allowed.
_INTEGER_RANGES = {
    "max_steps": (1, 1_000_000),
    "batch_size_per_device": (1, 1024),
    "gradient_accumulation_steps": (1, 1024),
    "max_length": (8, 1_048_576),
    "warmup_steps": (0, 1_000_000),
    "seed": (0, 2**32 - 1),
    "logging_interval_steps": (1, 100_000),
    "evaluation_interval_steps": (1, 1_000_000),
    "checkpoint_interval_steps": (1, 1_000_000),
    "keep_checkpoints": (1, 100),
}
# Field: lowest, highest, and whether the lowest itself is allowed.
_NUMBER_RANGES = {
    "num_epochs": (0.0, 1000.0, False),
    "learning_rate": (0.0, 1.0, False),
    "warmup_ratio": (0.0, 1.0, True),
    "weight_decay": (0.0, 1.0, True),
    "max_grad_norm": (0.0, 1e6, False),
}


def _violations(recipe: TrainingRecipe) -> Iterator[FieldViolation]:
    for name, (least, most) in _INTEGER_RANGES.items():
        value = getattr(recipe.hyperparameters, name)
        if value is not None:
            yield from _integer(f"hyperparameters.{name}", value, least, most)
    for name, (low, high, is_allowed) in _NUMBER_RANGES.items():
        yield from _number(f"hyperparameters.{name}", getattr(recipe.hyperparameters, name), low, high, is_allowed)
    yield from _choice("hyperparameters.scheduler", recipe.hyperparameters.scheduler, get_args(Scheduler))
    yield from _choice("hyperparameters.precision", recipe.hyperparameters.precision, get_args(Precision))
    yield from _adapter_violations(recipe.adapter)
    yield from _job_violations(recipe)


def _adapter_violations(adapter: LoraSettings) -> Iterator[FieldViolation]:
    yield from _choice("adapter.method", adapter.method, ("lora",))
    yield from _integer("adapter.rank", adapter.rank, 1, 1024)
    if adapter.alpha is not None:
        yield from _number("adapter.alpha", adapter.alpha, 0.0, 65536.0, False)
    yield from _choice("adapter.bias", adapter.bias, get_args(Bias))
    if not 0.0 <= adapter.dropout < 1.0:
        yield FieldViolation("adapter.dropout", f"{adapter.dropout} is not from 0 up to, not including, 1")
    if ALL_LINEAR in adapter.target_modules and len(adapter.target_modules) > 1:
        yield FieldViolation("adapter.target_modules", f"{ALL_LINEAR} stands alone")
    yield from _modules("adapter.target_modules", adapter.target_modules)
    yield from _modules("adapter.modules_to_save", adapter.modules_to_save)


def _job_violations(recipe: TrainingRecipe) -> Iterator[FieldViolation]:
    for name in ("base_model_folder", "train_file", "eval_file"):
        value = getattr(recipe, name)
        if value is not None and not Path(value).is_absolute():
            yield FieldViolation(name, "is not an absolute path")
    if not recipe.base_model_name or Path(recipe.base_model_name).is_absolute() or len(recipe.base_model_name) > 512:
        yield FieldViolation("base_model_name", "a portable name of 1 to 512 characters, not a path")
    yield from _number("held_out_fraction", recipe.held_out_fraction, 0.0, 0.5, True)
    yield from _choice("device", recipe.device, get_args(Device))
    yield from _integer("world_size", recipe.world_size, 1, 1024)
    if recipe.cpu_threads is not None:
        yield from _integer("cpu_threads", recipe.cpu_threads, 1, 1024)


def _integer(field: str, value: int, least: int, most: int) -> Iterator[FieldViolation]:
    if not least <= value <= most:
        yield FieldViolation(field, f"{value} is not from {least} to {most}")


def _number(field: str, value: float, low: float, high: float, is_low_allowed: bool) -> Iterator[FieldViolation]:
    """NaN and infinity fail both comparisons."""
    if not ((low <= value if is_low_allowed else low < value) and value <= high):
        yield FieldViolation(
            field, f"{value} is not {'from' if is_low_allowed else 'above'} {low:g} and at most {high:g}"
        )


def _choice(field: str, value: str, allowed: tuple[str, ...]) -> Iterator[FieldViolation]:
    if value not in allowed:
        yield FieldViolation(field, f"{value[:40]!r}; one of {', '.join(allowed)}")


def _modules(field: str, names: tuple[str, ...]) -> Iterator[FieldViolation]:
    if len(names) > _MAX_MODULES:
        yield FieldViolation(field, f"{len(names)} names; at most {_MAX_MODULES}")
    for place, name in enumerate(names[:_MAX_MODULES]):
        if not _MODULE_NAME.fullmatch(name):
            yield FieldViolation(f"{field}[{place}]", "1 to 128 letters, digits, dots, dashes and underscores")
