"""What serving reserves in the machine's device ledger, so that training does not take it.

On GPUs the configured share of each that the models are put on; on the CPU what the models, their caches at the largest
batch and their processes need. A machine that has less is told so in the log and serves all the same. Blocks for
milliseconds, or as long as the driver's tool takes; run it in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from slipstream_server.config import InferenceConfig
from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.front import ModelPlan
from slipstream_server.models.devices import CPU, device_memory
from slipstream_server.models.estimate import estimate_memory
from slipstream_server.storage.device_ledger import DeviceLedger

log = logging.getLogger(__name__)

NAME = "inference"
# What Python, torch and its libraries take before the first tensor.
_WORKER_BYTES = 700 * 1024**2


def reserve(ledger: DeviceLedger, config: InferenceConfig, plans: Sequence[ModelPlan]) -> None:
    """Reserve for ``plans``, in place of what was reserved before; ends with this process."""
    capacity = device_memory()
    try:
        ledger.reserve(NAME, wanted_bytes(config, plans, capacity), capacity)
    except SlipstreamError as error:
        log.warning("serving could not reserve its memory: %s", error.message)


def wanted_bytes(config: InferenceConfig, plans: Sequence[ModelPlan], capacity: Mapping[str, int]) -> dict[str, int]:
    """Bytes by device; nothing for a device whose memory is not known."""
    if config.batching == "null" or config.device == "mps":
        return {}
    gpus = [name for name in capacity if name != CPU]
    if config.device == CPU or (config.device == "auto" and not gpus):
        return {CPU: sum(_cpu_bytes(config, plan) for plan in plans)}
    if config.device_map is None:
        gpus = [name for name in gpus if name == (config.device if ":" in config.device else "cuda:0")]
    return {name: int(config.memory_fraction * capacity[name]) for name in gpus}


def _cpu_bytes(config: InferenceConfig, plan: ModelPlan) -> int:
    load = plan.worker.load
    estimate = estimate_memory(
        plan.facts,
        dtype=None if load.dtype == "auto" else load.dtype,
        quantization=load.quantization,
        double_quantization=load.double_quantization,
        context_tokens=0,
    )
    return estimate.total_bytes + estimate.kv_bytes_per_token * config.max_batch_tokens + _WORKER_BYTES
