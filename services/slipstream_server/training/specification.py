"""What a job is to do, as it was asked for with every default filled in, and what its validation found out about it.

Both are stored as JSON. A specification names things as clients do; a plan holds what they were at the time of the
check: the commit, the number of rows, the memory. Pure data; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from slipstream_server.errors import FieldViolation, InvalidField
from slipstream_server.training.recipe import Hyperparameters, LoraSettings, TrainingRecipe, check_recipe

DEFAULT_MAX_LENGTH = 1024
MAX_PRIORITY = 100
# How the recipe's fields are called in the contract.
_CONTRACT_NAMES = {
    "adapter.": "spec.lora.",
    "held_out_fraction": "spec.dataset.evaluation_fraction",
    "device": "spec.resources.device_type",
    "world_size": "spec.resources.device_count",
    "hyperparameters.num_epochs": "spec.hyperparameters.epochs",
    "hyperparameters.batch_size_per_device": "spec.hyperparameters.batch_size",
    "hyperparameters.max_length": "spec.hyperparameters.max_length_tokens",
    "hyperparameters.warmup_ratio": "spec.hyperparameters.warmup_fraction",
    "hyperparameters.max_grad_norm": "spec.hyperparameters.max_gradient_norm",
    "hyperparameters.logging_interval_steps": "spec.hyperparameters.logging_steps",
    "hyperparameters.precision": "spec.hyperparameters.data_type",
    "hyperparameters.evaluation_interval_steps": "spec.evaluation.interval_steps",
    "hyperparameters.checkpoint_interval_steps": "spec.checkpoints.interval_steps",
    "hyperparameters.keep_checkpoints": "spec.checkpoints.max_kept",
    "hyperparameters.": "spec.hyperparameters.",
}


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """Where the result goes. ``alias`` empty: none is asked for."""

    adapter: str
    alias: str = ""
    expected_alias_generation: int | None = None


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What happens when a job's processes die. The wait doubles with every further retry."""

    max_retries: int = 2
    resume_from_checkpoint: bool = True
    initial_backoff_s: float = 5.0
    max_attempt_s: float | None = None

    def backoff_s(self, num_retries: int) -> float:
        """The wait before the retry after ``num_retries`` earlier ones, an hour at most."""
        return min(3600.0, self.initial_backoff_s * 2.0 ** min(num_retries, 16))


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A training. ``max_length_is_default``: nobody chose ``hyperparameters.max_length``; the model's context makes it
    smaller.
    """

    base_model: str
    base_model_revision: str = ""
    dataset: str
    train_split: str = ""
    evaluation_split: str = ""
    evaluation_fraction: float = 0.1
    skip_invalid_rows: bool = False
    lora: LoraSettings = LoraSettings()
    hyperparameters: Hyperparameters = Hyperparameters()
    max_length_is_default: bool = False
    publication: Publication | None = None
    retries: RetryPolicy = RetryPolicy()
    device_type: str = ""
    num_processes: int = 1
    memory_bytes: int = 0
    priority: int = 0

    def recipe(
        self,
        *,
        base_model_folder: str = "/",
        base_model_name: str = "base",
        base_model_digest: str = "",
        train_file: str = "/",
        eval_file: str | None = None,
        dataset_digest: str = "",
        device: str = "cpu",
    ) -> TrainingRecipe:
        """What the runner is told; without the places, good enough to be checked."""
        return TrainingRecipe(
            base_model_folder=base_model_folder,
            base_model_name=base_model_name,
            base_model_digest=base_model_digest,
            train_file=train_file,
            eval_file=eval_file,
            held_out_fraction=0.0 if eval_file else self.evaluation_fraction,
            dataset_digest=dataset_digest,
            adapter=self.lora,
            hyperparameters=self.hyperparameters,
            device="cpu" if device == "cpu" else "auto",
            world_size=self.num_processes,
        )


class JobPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out while a job was validated. ``memory_bytes`` is for one process."""

    base_model_name: str
    base_model_revision: str
    base_model_digest: str
    dataset_digest: str
    device: str
    memory_bytes: int
    num_train_rows: int
    num_evaluation_rows: int
    num_skipped_rows: int
    recipe_digest: str


def check_spec(spec: JobSpec) -> None:
    """Raises one InvalidField that lists every value out of range, by its name in the contract."""
    violations = [*_recipe_violations(spec), *_violations(spec)]
    if violations:
        first = violations[0]
        raise InvalidField(f"{first.field}: {first.description}", violations=violations)


def _recipe_violations(spec: JobSpec) -> Iterator[FieldViolation]:
    try:
        check_recipe(spec.recipe())
    except InvalidField as error:
        for violation in error.violations:
            yield FieldViolation(_contract_name(violation.field), violation.description)


def _contract_name(field: str) -> str:
    for beginning, name in _CONTRACT_NAMES.items():
        if field.startswith(beginning):
            return name + field[len(beginning) :]
    return f"spec.{field}"


def _violations(spec: JobSpec) -> Iterator[FieldViolation]:
    policy = spec.retries
    yield from _range("spec.retry_policy.max_retries", policy.max_retries, 0, 10)
    yield from _range("spec.retry_policy.initial_backoff", policy.initial_backoff_s, 0, 3600)
    if policy.max_attempt_s is not None:
        yield from _range("spec.retry_policy.max_attempt_duration", policy.max_attempt_s, 60, math.inf)
    generation = spec.publication.expected_alias_generation if spec.publication else None
    if generation is not None and generation < 0:
        yield FieldViolation("spec.publish.expected_alias_generation", f"{generation} is below 0")
    yield from _range("spec.priority", spec.priority, -MAX_PRIORITY, MAX_PRIORITY)
    yield from _range("spec.resources.device_count", spec.num_processes, 1, 64)
    yield from _range("spec.resources.memory_bytes", spec.memory_bytes, 0, 2**53)
    if spec.device_type not in ("", "cpu", "cuda"):
        yield FieldViolation("spec.resources.device_type", f"{spec.device_type[:40]!a}; one of cpu, cuda, or empty")
    for name in ("train_split", "evaluation_split"):
        if len(getattr(spec, name)) > 63:
            yield FieldViolation(f"spec.dataset.{name}", "has more than 63 characters")


def _range(field: str, value: float, least: float, most: float) -> Iterator[FieldViolation]:
    if not least <= value <= most:
        yield FieldViolation(field, f"{value:g} is not from {least:g} to {most:g}")
