"""From a worker's configuration to an engine that answers: model, adapters, grammars, a first step, and the facts of it
all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from slipstream_server.errors import ModelLoadFailed
from slipstream_server.inference.engine.adapters import AdapterSlots, NoAdapters
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.continuous import ContinuousEngine
from slipstream_server.inference.engine.continuous_scheduler import StepLimits
from slipstream_server.inference.engine.core import Engine
from slipstream_server.inference.engine.decode_graphs import CudaRecorder
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.kv_budget import blocks_within, device_memory
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.padded import PaddedEngine
from slipstream_server.inference.engine.paged_attention import ATTENTION, UnsupportedAttention
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.engine.sequences import blocks_for
from slipstream_server.inference.engine.worker_model import Report, WorkerModel, load_worker_model
from slipstream_server.inference.generation import Failed, Finished, GenerationRequest, Ready, Sampling, Stopping
from slipstream_server.inference.worker_config import WorkerConfig

logger = logging.getLogger(__name__)

_WARM_UP_ID = -1
_CPU_STEP_TOKENS = 256
_GPU_STEP_TOKENS = 2048
_WARM_UP_TIMEOUT_S = 300.0


def assemble(config: WorkerConfig, report: Report, poll: Callable[[], None]) -> tuple[Engine, Ready]:
    """Load the model and build its engine; raises a SlipstreamError that says why it cannot be."""
    model = load_worker_model(config, config.load, report)
    traits = Traits.of(model.loaded.model)
    slots = _slots(model.loaded.model, config)
    grammars = Grammars(model.folder, traits.vocab_size)
    grammars.prepare()
    report(0.9, "first step")
    reason: dict[str, str] = {}
    if config.engine == "continuous":
        try:
            return _continuous(model, PackedModel(traits), config, slots, grammars, report)
        except UnsupportedAttention as why:
            logger.warning("the model is served by padded batches: continuous ones do not support %s", why)
            reason = {"batching_reason": f"continuous batching does not support {why}"}
            config = msgspec.structs.replace(config, engine="padded")
    return _padded(model, config, slots, grammars, poll), model.ready(config, **_adapter_facts(config), **reason)


def _padded(
    model: WorkerModel, config: WorkerConfig, slots: AdapterSlots, grammars: Grammars, poll: Callable[[], None]
) -> Engine:
    warm_up(PaddedEngine(model.loaded.model, config.limits()))
    return PaddedEngine(model.loaded.model, config.limits(), slots=slots, grammars=grammars, poll=poll)


def _continuous(
    worker_model: WorkerModel,
    model: PackedModel,
    config: WorkerConfig,
    slots: AdapterSlots,
    grammars: Grammars,
    report: Report,
) -> tuple[Engine, Ready]:
    device = worker_model.loaded.device
    step_tokens = config.max_step_tokens or (_CPU_STEP_TOKENS if device.type == "cpu" else _GPU_STEP_TOKENS)
    limits = StepLimits(max_running=config.max_batch_size, max_step_tokens=step_tokens)
    context_tokens = model.traits.context_tokens or config.max_batch_tokens
    # On a GPU the first step is a full one: what it needs is in use when blocks are counted.
    num_first = 1 if device.type == "cpu" else max(1, min(step_tokens, context_tokens - 2))
    warm_up(ContinuousEngine(model, limits, num_blocks=blocks_for(num_first + 2)), num_first)
    num_blocks = _num_blocks(model, config, context_tokens)
    engine = ContinuousEngine(
        model,
        limits,
        num_blocks,
        slots=slots,
        grammars=grammars,
        prefix_caching=config.prefix_caching,
        max_draft_tokens=config.max_draft_tokens,
        runs_ahead=device.type == "cuda",
    )
    is_recorded = device.type == "cuda" and model.record_decoding(
        CudaRecorder(device), config.max_batch_size, lambda done: report(0.9 + 0.1 * done, "recording steps")
    )
    ready = worker_model.ready(
        config,
        **_adapter_facts(config),
        decode_graphs=str(is_recorded).lower(),
        max_step_tokens=str(step_tokens),
        kv_capacity_tokens=str(num_blocks * BLOCK_TOKENS),
        prefix_caching=str(config.prefix_caching).lower(),
        max_draft_tokens=str(config.max_draft_tokens),
    )
    return engine, msgspec.structs.replace(
        ready,
        attention=ATTENTION,
        memory_bytes=ready.memory_bytes + num_blocks * model.block_bytes,
        kv_capacity_tokens=num_blocks * BLOCK_TOKENS,
    )


def _num_blocks(model: PackedModel, config: WorkerConfig, context_tokens: int) -> int:
    """By tokens; on GPUs by what the configured share of them leaves."""
    most_tokens = config.max_batch_size * context_tokens
    devices = model.block_bytes_by_device
    if not config.kv_memory_fraction or any(device.type != "cuda" for device in devices):
        return blocks_for(min(config.max_batch_tokens, most_tokens))
    return blocks_within(
        config.kv_memory_fraction,
        devices,
        device_memory(devices),
        most_blocks=blocks_for(most_tokens),
        least_blocks=blocks_for(min(context_tokens, config.max_batch_tokens)),
    )


def _slots(model: Any, config: WorkerConfig) -> AdapterSlots:
    if not config.adapter_slots:
        return NoAdapters()
    return LoraSlots(model, num_slots=config.adapter_slots, max_rank=config.max_adapter_rank)


def _adapter_facts(config: WorkerConfig) -> dict[str, str]:
    return {"adapter_slots": str(config.adapter_slots), "max_adapter_rank": str(config.max_adapter_rank)}


def warm_up(engine: Engine, num_prompt_tokens: int = 1) -> None:
    """Generate two tokens after a prompt of so many, so that whatever is allocated or compiled on first use is there,
    and a broken model is found out now.
    """
    request = GenerationRequest(
        id=_WARM_UP_ID,
        prompt_token_ids=(0,) * num_prompt_tokens,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=2),
    )
    engine.submit(request)
    limit = time.monotonic() + _WARM_UP_TIMEOUT_S
    while time.monotonic() < limit:
        for event in engine.step():
            if isinstance(event, Failed):
                raise ModelLoadFailed(f"the model's first step failed: {event.message}")
            if isinstance(event, Finished):
                return
    raise ModelLoadFailed(f"the model did not answer within {_WARM_UP_TIMEOUT_S:.0f} s")
