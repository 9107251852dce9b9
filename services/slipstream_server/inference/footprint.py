"""How much memory serving a model will take, by device, from its plan alone. Pure; any thread.

Weights as they are held, keys and values of the largest batch, activations, packed copies of linear weights, and what a
worker process takes before the first tensor. Adapters are not counted: their slots are made when they are first used.
"""

from __future__ import annotations

from collections.abc import Mapping

from slipstream_server.inference.served_model import ModelPlan
from slipstream_server.models.devices import CPU
from slipstream_server.models.estimate import DTYPE_BYTES, estimate_memory
from slipstream_server.models.load_options import LoadOptions, Quantization

# What Python, torch and its libraries take before the first tensor; on a GPU, its context.
_PROCESS_BYTES = 700 * 1024**2
_PACKED_DTYPES = frozenset({"float32", "bfloat16"})


def devices_of(load: LoadOptions, capacity: Mapping[str, int]) -> tuple[str, ...]:
    """The devices of this machine that a model is put on; none where their memory is not known."""
    gpus = tuple(name for name in capacity if name != CPU)
    if load.device == CPU or (load.device == "auto" and not gpus):
        return (CPU,)
    if load.device_map is not None:
        return gpus
    wanted = load.device if ":" in load.device else "cuda:0"
    return tuple(name for name in gpus if name == wanted)


def footprint(plan: ModelPlan, capacity: Mapping[str, int]) -> dict[str, int]:
    """Bytes by device; nothing for the engine that runs no model."""
    if plan.worker.engine == "null":
        return {}
    devices = devices_of(plan.worker.load, capacity)
    share = -(-_weights_and_cache(plan, on_cpu=devices == (CPU,)) // max(1, len(devices)))
    return dict.fromkeys(devices, share + _PROCESS_BYTES)


def _weights_and_cache(plan: ModelPlan, *, on_cpu: bool) -> int:
    worker, facts = plan.worker, plan.facts
    dtype = facts.dtype if worker.load.dtype == "auto" else worker.load.dtype
    estimate = estimate_memory(
        facts,
        dtype=dtype,
        quantization=worker.load.quantization,
        double_quantization=worker.load.double_quantization,
        context_tokens=0,
    )
    context_tokens = plan.max_context_tokens or facts.context_tokens
    cached_tokens = worker.max_batch_tokens
    if context_tokens is not None:
        cached_tokens = min(cached_tokens, worker.max_batch_size * context_tokens)
    is_packed = on_cpu and worker.packed_linears and _can_be_packed(plan, dtype)
    packed_bytes = (facts.num_parameters - _embedded(plan)) * DTYPE_BYTES[dtype] if is_packed else 0
    return estimate.total_bytes + estimate.kv_bytes_per_token * cached_tokens + max(0, packed_bytes)


def _can_be_packed(plan: ModelPlan, dtype: str) -> bool:
    is_quantized = plan.worker.load.quantization is not Quantization.NONE or plan.facts.is_quantized
    return not is_quantized and dtype in _PACKED_DTYPES


def _embedded(plan: ModelPlan) -> int:
    """Parameters of the token table that no linear layer shares: a tied output layer is packed like any other."""
    return 0 if plan.facts.ties_embeddings else (plan.facts.vocab_size or 0) * (plan.facts.hidden_size or 0)
