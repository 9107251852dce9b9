"""Specifications of trainings: from the contract, with every default filled in, and back. Pure functions.

What this build cannot honour is UnsupportedField, by its name; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream.type.v1 import lora_pb2, precision_pb2
from slipstream_server.errors import FieldViolation, InvalidField, UnsupportedField
from slipstream_server.resource_names import AdapterName, check_alias
from slipstream_server.rpc.training.requests import dataset_id
from slipstream_server.training.recipe import ALL_LINEAR, Bias, Hyperparameters, LoraSettings, Precision, Scheduler
from slipstream_server.training.specification import DEFAULT_MAX_LENGTH, JobSpec, Publication, RetryPolicy

T = TypeVar("T")

_EVALUATION_FRACTION = 0.1
_METRICS = ("eval_loss", "perplexity")

SCHEDULERS: dict[int, Scheduler] = {
    pb2.LEARNING_RATE_SCHEDULER_UNSPECIFIED: "linear",
    pb2.LEARNING_RATE_SCHEDULER_LINEAR: "linear",
    pb2.LEARNING_RATE_SCHEDULER_COSINE: "cosine",
    pb2.LEARNING_RATE_SCHEDULER_CONSTANT: "constant",
    pb2.LEARNING_RATE_SCHEDULER_CONSTANT_WITH_WARMUP: "constant_with_warmup",
}
_PRECISIONS: dict[int, Precision] = {
    precision_pb2.DATA_TYPE_UNSPECIFIED: "auto",
    precision_pb2.DATA_TYPE_FLOAT32: "float32",
    precision_pb2.DATA_TYPE_BFLOAT16: "bfloat16",
}
_BIASES: dict[int, Bias] = {
    lora_pb2.LORA_BIAS_UNSPECIFIED: "none",
    lora_pb2.LORA_BIAS_NONE: "none",
    lora_pb2.LORA_BIAS_LORA_ONLY: "lora_only",
    lora_pb2.LORA_BIAS_ALL: "all",
}
# Of equal values the last one is the named one.
_SCHEDULER_NUMBERS = {name: number for number, name in SCHEDULERS.items()}
_BIAS_NUMBERS = {name: number for number, name in _BIASES.items()}
PRECISION_NUMBERS = {name: number for number, name in _PRECISIONS.items()}


def spec_of(message: pb2.TrainingJobSpec, *, needs_dataset: bool = True) -> JobSpec:
    """The specification in ``message``; ranges are checked by the room. Raises InvalidField, UnsupportedField."""
    unsupported = list(_unsupported(message))
    if unsupported:
        first = unsupported[0]
        raise UnsupportedField(f"{first.field}: {first.description}", violations=unsupported)
    if message.WhichOneof("method") is None:
        raise InvalidField.of("spec.method", "one of lora, qlora and full is required")
    if len(message.base_model) > 512 or not message.base_model.isprintable():
        raise InvalidField.of("spec.base_model", "has at most 512 printable characters")
    chosen, resources = message.dataset, message.resources
    has_dataset = needs_dataset or bool(chosen.dataset)
    return JobSpec(
        base_model=message.base_model,
        base_model_revision=message.base_model_revision,
        dataset=dataset_id(chosen.dataset, "spec.dataset.dataset") if has_dataset else "",
        train_split=chosen.train_split,
        evaluation_split=chosen.evaluation_split,
        evaluation_fraction=_or(chosen, "evaluation_fraction", _EVALUATION_FRACTION),
        skip_invalid_rows=chosen.skip_invalid_rows,
        lora=_lora(message.lora),
        hyperparameters=_hyperparameters(message),
        max_length_is_default=not message.hyperparameters.HasField("max_length_tokens"),
        publication=_publication(message),
        retries=_retries(message.retry_policy),
        device_type=resources.device_type,
        num_processes=_or(resources, "device_count", 1),
        memory_bytes=resources.memory_bytes,
        priority=message.priority,
    )


def spec_message(spec: JobSpec) -> pb2.TrainingJobSpec:
    """``spec`` as it is stored."""
    message = pb2.TrainingJobSpec(
        base_model=spec.base_model,
        base_model_revision=spec.base_model_revision,
        task=pb2.TRAINING_TASK_CAUSAL_LM,
        dataset=pb2.DatasetSelection(
            dataset=f"datasets/{spec.dataset}" if spec.dataset else "",
            train_split=spec.train_split,
            evaluation_split=spec.evaluation_split,
            evaluation_fraction=spec.evaluation_fraction,
            skip_invalid_rows=spec.skip_invalid_rows,
        ),
        lora=_lora_message(spec.lora),
        loop=pb2.TRAINING_LOOP_TRAINER,
        hyperparameters=_hyperparameters_message(spec),
        evaluation=pb2.EvaluationOptions(
            interval_steps=spec.hyperparameters.evaluation_interval_steps,
            batch_size=spec.hyperparameters.batch_size_per_device,
            metrics=_METRICS,
            before_training=True,
            best_metric="eval_loss",
        ),
        checkpoints=pb2.CheckpointOptions(
            interval_steps=spec.hyperparameters.checkpoint_interval_steps,
            max_kept=spec.hyperparameters.keep_checkpoints,
        ),
        retry_policy=_retries_message(spec.retries),
        engine=pb2.TRAINING_ENGINE_LOCAL,
        resources=pb2.TrainingResources(
            device_type=spec.device_type,
            device_count=spec.num_processes,
            node_count=1,
            memory_bytes=spec.memory_bytes,
        ),
        priority=spec.priority,
    )
    if (publication := spec.publication) is not None:
        message.publish.adapter = f"adapters/{publication.adapter}"
        message.publish.alias = publication.alias
        if publication.expected_alias_generation is not None:
            message.publish.expected_alias_generation = publication.expected_alias_generation
    return message


def _unsupported(message: pb2.TrainingJobSpec) -> Iterator[FieldViolation]:
    numbers, chosen, evaluation = message.hyperparameters, message.dataset, message.evaluation
    batch_size = _or(numbers, "batch_size", 8)
    engines = (pb2.TRAINING_ENGINE_UNSPECIFIED, pb2.TRAINING_ENGINE_LOCAL)
    asked = {
        "task": message.task not in (pb2.TRAINING_TASK_UNSPECIFIED, pb2.TRAINING_TASK_CAUSAL_LM),
        "qlora": message.WhichOneof("method") == "qlora",
        "full": message.WhichOneof("method") == "full",
        "initial_adapter": bool(message.initial_adapter),
        "loop": message.loop not in (pb2.TRAINING_LOOP_UNSPECIFIED, pb2.TRAINING_LOOP_TRAINER),
        "engine": message.engine not in engines,
        "dataset.max_train_rows": chosen.HasField("max_train_rows"),
        "dataset.train_on_prompt": chosen.train_on_prompt,
        "dataset.chat_template": bool(chosen.chat_template),
        "hyperparameters.scheduler": numbers.scheduler not in SCHEDULERS,
        "hyperparameters.data_type": numbers.data_type not in _PRECISIONS,
        "hyperparameters.adam_beta1": _or(numbers, "adam_beta1", 0.9) != 0.9,
        "hyperparameters.adam_beta2": _or(numbers, "adam_beta2", 0.999) != 0.999,
        "hyperparameters.activation_checkpointing": numbers.activation_checkpointing,
        "hyperparameters.packing": numbers.packing,
        "hyperparameters.dpo_beta": numbers.HasField("dpo_beta"),
        "evaluation.batch_size": _or(evaluation, "batch_size", batch_size) != batch_size,
        "evaluation.max_rows": evaluation.HasField("max_rows"),
        "evaluation.metrics": not set(evaluation.metrics) <= set(_METRICS),
        "evaluation.before_training": not _or(evaluation, "before_training", True),
        "evaluation.publish_best": evaluation.publish_best,
        "evaluation.best_metric": evaluation.best_metric not in ("", "eval_loss"),
        "evaluation.early_stopping_patience": evaluation.HasField("early_stopping_patience"),
        "resources.node_count": _or(message.resources, "node_count", 1) != 1,
        "resources.queue_name": bool(message.resources.queue_name),
        "lora.bias": message.lora.bias not in _BIASES,
    }
    for name, is_asked in asked.items():
        if is_asked:
            yield FieldViolation(f"spec.{name}", "this build cannot honour the value; leave it out")


def _or(message: Message, field: str, default: T) -> T:
    """The value of an optional field, or its default."""
    return getattr(message, field) if message.HasField(field) else default


def _lora(message: lora_pb2.LoraConfig) -> LoraSettings:
    return LoraSettings(
        rank=_or(message, "rank", 8),
        alpha=_or(message, "alpha", 2.0 * _or(message, "rank", 8)),
        dropout=message.dropout,
        target_modules=tuple(message.target_modules) or (ALL_LINEAR,),
        modules_to_save=tuple(message.modules_to_save),
        bias=_BIASES[message.bias],
        use_rslora=message.use_rslora,
        use_dora=message.use_dora,
    )


def _lora_message(lora: LoraSettings) -> lora_pb2.LoraConfig:
    return lora_pb2.LoraConfig(
        rank=lora.rank,
        alpha=lora.effective_alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        bias=_BIAS_NUMBERS[lora.bias],  # type: ignore[arg-type]
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _hyperparameters(message: pb2.TrainingJobSpec) -> Hyperparameters:
    numbers = message.hyperparameters
    if numbers.warmup_steps and numbers.warmup_fraction:
        raise InvalidField.of("spec.hyperparameters.warmup_fraction", "excludes warmup_steps")
    return Hyperparameters(
        num_epochs=_or(numbers, "epochs", 3.0),
        max_steps=_or(numbers, "max_steps", None),
        learning_rate=_or(numbers, "learning_rate", 2e-4),
        batch_size_per_device=_or(numbers, "batch_size", 8),
        gradient_accumulation_steps=_or(numbers, "gradient_accumulation_steps", 1),
        max_length=_or(numbers, "max_length_tokens", DEFAULT_MAX_LENGTH),
        warmup_steps=numbers.warmup_steps or None,
        warmup_ratio=numbers.warmup_fraction,
        scheduler=SCHEDULERS[numbers.scheduler],
        weight_decay=numbers.weight_decay,
        max_grad_norm=_or(numbers, "max_gradient_norm", 1.0),
        seed=_or(numbers, "seed", 0),
        logging_interval_steps=_or(numbers, "logging_steps", 5),
        evaluation_interval_steps=_or(message.evaluation, "interval_steps", None),
        checkpoint_interval_steps=_or(message.checkpoints, "interval_steps", 100),
        keep_checkpoints=_or(message.checkpoints, "max_kept", 2),
        precision=_PRECISIONS[numbers.data_type],
    )


def _hyperparameters_message(spec: JobSpec) -> pb2.Hyperparameters:
    chosen = spec.hyperparameters
    return pb2.Hyperparameters(
        epochs=chosen.num_epochs,
        max_steps=chosen.max_steps,
        learning_rate=chosen.learning_rate,
        batch_size=chosen.batch_size_per_device,
        gradient_accumulation_steps=chosen.gradient_accumulation_steps,
        max_length_tokens=None if spec.max_length_is_default else chosen.max_length,
        warmup_steps=chosen.warmup_steps or 0,
        warmup_fraction=chosen.warmup_ratio,
        scheduler=_SCHEDULER_NUMBERS[chosen.scheduler],  # type: ignore[arg-type]
        weight_decay=chosen.weight_decay,
        max_gradient_norm=chosen.max_grad_norm,
        adam_beta1=0.9,
        adam_beta2=0.999,
        seed=chosen.seed,
        data_type=PRECISION_NUMBERS[chosen.precision],  # type: ignore[arg-type]
        logging_steps=chosen.logging_interval_steps,
    )


def _publication(message: pb2.TrainingJobSpec) -> Publication | None:
    publish = message.publish
    if not publish.adapter:
        if publish.alias:
            raise InvalidField.of("spec.publish.adapter", "is needed where an alias is asked for")
        return None
    name = publish.adapter if "/" in publish.adapter else f"adapters/{publish.adapter}"
    return Publication(
        adapter=AdapterName.parse(name, "spec.publish.adapter").adapter,
        alias=check_alias(publish.alias, "spec.publish.alias") if publish.alias else "",
        expected_alias_generation=_or(publish, "expected_alias_generation", None),
    )


def _retries(message: pb2.RetryPolicy) -> RetryPolicy:
    defaults = RetryPolicy()
    has_backoff, has_limit = message.HasField("initial_backoff"), message.HasField("max_attempt_duration")
    return RetryPolicy(
        max_retries=_or(message, "max_retries", defaults.max_retries),
        resume_from_checkpoint=_or(message, "resume_from_checkpoint", defaults.resume_from_checkpoint),
        initial_backoff_s=_seconds(message.initial_backoff) if has_backoff else defaults.initial_backoff_s,
        max_attempt_s=_seconds(message.max_attempt_duration) if has_limit else None,
    )


def _retries_message(policy: RetryPolicy) -> pb2.RetryPolicy:
    message = pb2.RetryPolicy(
        max_retries=policy.max_retries,
        resume_from_checkpoint=policy.resume_from_checkpoint,
        initial_backoff=duration(policy.initial_backoff_s),
    )
    if policy.max_attempt_s is not None:
        message.max_attempt_duration.CopyFrom(duration(policy.max_attempt_s))
    return message


def _seconds(span: Duration) -> float:
    return span.seconds + span.nanos / 1e9


def duration(seconds: float) -> Duration:
    span = Duration()
    span.FromMilliseconds(round(seconds * 1000))
    return span
