"""The keyword arguments of a training, under the contract's own names: ranges and defaults stand there.

None, like leaving it out, means: the server's own default. Enums are given as their words, durations in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from slipstream_client.options import CallOptions


class LoraOptions(TypedDict, total=False):
    """``slipstream.type.v1.LoraConfig``. ``bias``: none, lora_only or all."""

    rank: int | None
    alpha: float | None
    dropout: float | None
    target_modules: Sequence[str] | None
    modules_to_save: Sequence[str] | None
    bias: str | None
    use_rslora: bool | None
    use_dora: bool | None


class QloraOptions(TypedDict, total=False):
    """``QloraConfig``. ``quantization``: nf4, fp4 or int8."""

    lora: LoraOptions | None
    quantization: str | None
    double_quantization: bool | None
    compute_data_type: str | None


class FullOptions(TypedDict, total=False):
    """``FullConfig``."""

    model_id: str | None
    frozen_modules: Sequence[str] | None


class SelectionOptions(TypedDict, total=False):
    """``DatasetSelection``, but for the dataset itself."""

    train_split: str | None
    evaluation_split: str | None
    evaluation_fraction: float | None
    max_train_rows: int | None
    skip_invalid_rows: bool | None
    train_on_prompt: bool | None
    chat_template: str | None


class HyperparameterOptions(TypedDict, total=False):
    """``Hyperparameters``. ``scheduler``: linear, cosine, constant or constant_with_warmup."""

    epochs: float | None
    max_steps: int | None
    learning_rate: float | None
    batch_size: int | None
    gradient_accumulation_steps: int | None
    max_length_tokens: int | None
    warmup_steps: int | None
    warmup_fraction: float | None
    scheduler: str | None
    weight_decay: float | None
    max_gradient_norm: float | None
    adam_beta1: float | None
    adam_beta2: float | None
    seed: int | None
    data_type: str | None
    activation_checkpointing: bool | None
    packing: bool | None
    logging_steps: int | None
    dpo_beta: float | None


class EvaluationOptions(TypedDict, total=False):
    """``EvaluationOptions``."""

    interval_steps: int | None
    batch_size: int | None
    max_rows: int | None
    metrics: Sequence[str] | None
    before_training: bool | None
    publish_best: bool | None
    best_metric: str | None
    early_stopping_patience: int | None


class CheckpointOptions(TypedDict, total=False):
    """``CheckpointOptions``."""

    interval_steps: int | None
    max_kept: int | None


class PublishOptions(TypedDict, total=False):
    """``PublishOptions``."""

    adapter: str | None
    alias: str | None
    expected_alias_generation: int | None


class RetryOptions(TypedDict, total=False):
    """``RetryPolicy``."""

    max_retries: int | None
    resume_from_checkpoint: bool | None
    initial_backoff: float | None
    max_attempt_duration: float | None


class ResourceOptions(TypedDict, total=False):
    """``TrainingResources``."""

    device_type: str | None
    device_count: int | None
    node_count: int | None
    memory_bytes: int | None
    queue_name: str | None


class SpecOptions(TypedDict, total=False):
    """``TrainingJobSpec``, but for model and dataset. Of ``lora`` (the default), ``qlora`` and ``full`` at most one."""

    base_model_revision: str | None
    task: str | None
    selection: SelectionOptions | None
    lora: LoraOptions | None
    qlora: QloraOptions | None
    full: FullOptions | None
    initial_adapter: str | None
    loop: str | None
    hyperparameters: HyperparameterOptions | None
    evaluation: EvaluationOptions | None
    checkpoints: CheckpointOptions | None
    publish: PublishOptions | None
    retry_policy: RetryOptions | None
    engine: str | None
    resources: ResourceOptions | None
    priority: int | None


class CreateJobOptions(SpecOptions, CallOptions, total=False):
    """Keyword arguments of ``jobs.create``."""

    job_id: str | None
    display_name: str | None
    labels: Mapping[str, str] | None
    validate_only: bool | None
