"""The keyword arguments of ``models.load``, under the contract's own names: ranges and defaults stand there.

None, like leaving it out, means: the service's own choice. Enums are given as their words.
"""

from __future__ import annotations

from typing import TypedDict

from slipstream_client.options import CallOptions


class ModelLoadOptions(TypedDict, total=False):
    """``ModelLoadOptions``. ``data_type``: float32, bfloat16, float16; ``quantization``: none, int8, nf4, fp4;
    ``batching``: padded, continuous.
    """

    data_type: str | None
    quantization: str | None
    double_quantization: bool | None
    device: str | None
    attention_implementation: str | None
    batching: str | None
    context_tokens: int | None
    max_running_sequences: int | None
    memory_fraction: float | None
    adapter_slot_count: int | None
    max_adapter_rank: int | None
    tensor_parallel_count: int | None
    prefix_caching: bool | None
    batch_invariant: bool | None


class LoadModelOptions(ModelLoadOptions, CallOptions, total=False):
    """Keyword arguments of ``models.load``."""

    source: str | None
    revision: str | None
    pinned: bool | None
    validate_only: bool | None


class EstimateOptions(ModelLoadOptions, CallOptions, total=False):
    """Keyword arguments of ``models.estimate``."""

    revision: str | None


LOAD_FIELDS = frozenset(ModelLoadOptions.__annotations__)
