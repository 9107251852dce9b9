"""How much memory serving a model will take, by device, from its plan alone. Pure; any thread.

Weights as they are held, keys and values of the largest batch, activations, packed copies of linear weights, and what a
worker process takes before the first tensor. Adapters are not counted: their slots are made when they are first used.
"""

from __future__ import annotations

from collections.abc import Mapping

from slipstream_server.inference.engines import CONTINUOUS, PADDED, TASKS
from slipstream_server.inference.served_model import ModelPlan
from slipstream_server.models.devices import CPU
from slipstream_server.models.estimate import DTYPE_BYTES, MemoryEstimate, estimate_memory
from slipstream_server.models.load_options import LoadOptions, Quantization

# What a worker holds beside its model on a CPU: resident memory with a tiny model, as measured with torch 2.13 and
# transformers 5.23, rounded up. Up to 190 MiB of it are libraries that all workers share.
_CPU_PROCESS_BYTES = {TASKS: 450 * 1024**2, PADDED: 450 * 1024**2, CONTINUOUS: 550 * 1024**2}
# A GPU's context, and the workspaces of its libraries.
_GPU_PROCESS_BYTES = 700 * 1024**2
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
    return dict.fromkeys(devices, share + process_bytes(plan.worker.engine, on_cpu=devices == (CPU,)))


def process_bytes(engine: str, *, on_cpu: bool) -> int:
    """What a worker takes on each of its devices before the first weight."""
    return _CPU_PROCESS_BYTES[engine] if on_cpu else _GPU_PROCESS_BYTES


def dtype_of(plan: ModelPlan) -> str:
    """The type that the weights are held in, where they are not quantized."""
    return plan.facts.dtype if plan.worker.load.dtype == "auto" else plan.worker.load.dtype


def memory_of(plan: ModelPlan) -> MemoryEstimate:
    """Weights as they are held, and what a token of context takes; no context is counted."""
    load = plan.worker.load
    return estimate_memory(
        plan.facts,
        dtype=dtype_of(plan),
        quantization=load.quantization,
        double_quantization=load.double_quantization,
        context_tokens=0,
    )


def cached_tokens(plan: ModelPlan) -> int:
    """Tokens of the largest batch: as many as its rows' contexts hold, and no more than one batch may have."""
    context_tokens = plan.max_context_tokens or plan.facts.context_tokens
    most = plan.worker.max_batch_tokens
    return most if context_tokens is None else min(most, plan.worker.max_batch_size * context_tokens)


def _weights_and_cache(plan: ModelPlan, *, on_cpu: bool) -> int:
    estimate, dtype = memory_of(plan), dtype_of(plan)
    is_packed = on_cpu and plan.worker.packed_linears and _can_be_packed(plan, dtype)
    packed_bytes = (plan.facts.num_parameters - _embedded(plan)) * DTYPE_BYTES[dtype] if is_packed else 0
    return estimate.total_bytes + estimate.kv_bytes_per_token * cached_tokens(plan) + max(0, packed_bytes)


def _can_be_packed(plan: ModelPlan, dtype: str) -> bool:
    is_quantized = plan.worker.load.quantization is not Quantization.NONE or plan.facts.is_quantized
    return not is_quantized and dtype in _PACKED_DTYPES


def _embedded(plan: ModelPlan) -> int:
    """Parameters of the token table that no linear layer shares: a tied output layer is packed like any other."""
    return 0 if plan.facts.ties_embeddings else (plan.facts.vocab_size or 0) * (plan.facts.hidden_size or 0)
